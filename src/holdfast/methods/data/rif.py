"""RIF: rows that no sampled answer of the base solves are left out.

    a row stays if max_{k <= samples} score(y_k, y) > least,   y_k ~ p_base(.|x), y its given answer

score: a verifier, "exact", "contains", "number", or module:function. `solved` leaves out rows that every sample solves
too, from which there is nothing to learn (ours). The base is asked once, before training; answers are kept in the
cache, and the report says how many rows went. Made for reinforcement learning, where such rows give no reward; in
plain training they are the ones with the largest gradients, so it is a filter for what is out of reach.
Differences: the paper filters with the model before each task of a sequence; a run has one task. Its number of samples
and its threshold were read in a re-implementation.
Pitfall: it cannot add knowledge. Where the rows teach what the base cannot know, it leaves out what is to be learnt.
Cost: `samples` generations a row before training. Combine with: everything; S3FT and DART, which use such answers.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.data.asked import Reader
from holdfast.data.encoder import encoder_of
from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.measure.answers import room_of
from holdfast.measure.verifiers import verifier
from holdfast.method import Method, Paper
from holdfast.methods.data._samples import judged
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class RIF(Method):
    """Rollout-based instance filtering (Lai et al. 2025), arXiv 2507.05386."""

    samples: int = 8  # a re-implementation
    least: float = 0.0  # a re-implementation; scores above it solve a row
    solved: bool = False  # ours
    verifier: str = "contains"  # ours
    temperature: float = 1.0  # ours
    max_new_tokens: int = 256  # ours
    ended: bool = False  # ours: answers that were cut off count as they stand

    paper: ClassVar = Paper("Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training",
                            "2507.05386", "threshold and number of samples from other code")  # fmt: skip
    does: ClassVar = "leaves out rows that no answer of the base solves"

    def check(self, ctx: Context) -> None:
        verifier(self.verifier, ctx.base_dir)
        if min(self.samples, self.max_new_tokens) < 1 or self.temperature <= 0 or not 0 <= self.least < 1:
            what = (
                "RIF needs samples and max_new_tokens of at least 1, temperature above 0, and least from 0 to below 1."
            )
            raise PlanError(what, "Mend them.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        read, room = {r.key: reader.read(r) for r in mix.task}, room_of(ctx.model) - self.max_new_tokens
        said = judged(
            {key: a for key, a in read.items() if a and len(a.ids) <= room}, reader, ctx, self.verifier,
            num=self.samples, temperature=self.temperature, max_new_tokens=self.max_new_tokens, ended=self.ended,
            words="RIF: answers of the base",
        )  # fmt: skip
        solves = {key: [score > self.least for _, score in samples] for key, samples in said.items()}

        def keeps(row: TokenRow) -> bool:
            found = solves.get(row.key, [True, False])  # what cannot be asked stays
            return any(found) and not (self.solved and all(found))

        count = sum(map(keeps, mix.task))
        ctx.notes.append(f"RIF keeps {count} of {len(mix.task)} rows (verifier {self.verifier})")
        return mix.with_filter(self.name, keeps)
