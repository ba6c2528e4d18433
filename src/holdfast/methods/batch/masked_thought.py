"""MaskedThought: read some tokens of the answer wrong, and predict every one of them all the same.

    x'_t = a random token with probability m, else x_t       for t in the answer; the prompt is read as it is
    loss = -mean_t log p(x_t | x'_<t),   m = max_rate * min(1, step / (warmup * steps of the run))

x: the row; x': what is read of it. Targets are those of plain fine-tuning for any m, so the model cannot lean on its
last words alone and must go back to the question and to earlier steps. max_rate 0 is plain fine-tuning.
Differences: the released code draws how many tokens of a row change and then which; here each changes by itself, the
same in law. There the rate divides by one step more. Draws depend on the run's seed, the step and the row's content,
so they are equal in every process and in a resumed run, and two equal rows of one step change alike. Any id of the
vocabulary may stand in, special ones too.
Rows that other methods mix in stay as they are.
Made for chains of thought; it hurts tasks that copy their input (code, extraction), and an answer of one token has
nothing to corrupt. A KL to the base compares both on what was read, so the base must answer anew at every step.
Cost: none. Combine with: every adapt, loss and token_weight method.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from holdfast.engine.pack import TokenRow
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context, Look


@dataclass(frozen=True, kw_only=True)
class MaskedThought(Method):
    """Masked thought fine-tuning (Chen et al., ACL 2024), arXiv 2403.02178."""

    max_rate: float = 0.4  # released script for GSM8K
    warmup: float = 0.66  # released script: part of the run in which the rate rises from 0
    fill: str = "random"  # released script for GSM8K; the others put a mask or padding token

    paper: ClassVar = Paper("Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical "
                            "Reasoning Learning of Language Models", "2403.02178",
                            "read in summaries and in the released code")  # fmt: skip
    does: ClassVar = "replaces tokens of the answers that are read by random ones and keeps the targets"
    strengths: ClassVar = ("max_rate",)
    odds: ClassVar = strengths
    writes: ClassVar = frozenset({"ids", "targets"})

    def off(self) -> bool:
        return self.max_rate == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.max_rate <= 1:
            raise PlanError(f"MaskedThought.max_rate is {self.max_rate}.", "Use a share of the tokens, 0 to 1.")
        if not 0 <= self.warmup <= 1:
            raise PlanError(f"MaskedThought.warmup is {self.warmup}.", "Use a part of the run, 0 to 1.")
        if self.fill not in ("random", "pad"):
            raise PlanError(f"MaskedThought.fill is {self.fill!r}.", "Use 'random' or 'pad'.")
        if self.fill == "pad" and getattr(ctx.tokenizer, "pad_token_id", None) is None:
            raise PlanError(
                "MaskedThought.fill is 'pad', but the tokenizer has no padding token.", "Use fill: random."
            )

    def batch(self, rows: Sequence[TokenRow], step: int, look: Look) -> Sequence[TokenRow]:
        rate = self.rate(step, look.ctx.total_steps)
        return [self.masked(r, rate, step, look.ctx) if r.of_task else r for r in rows] if rate else rows

    def rate(self, step: int, total: int) -> float:
        """Probability at `step` (0-based) of a run of `total` steps that a token changes."""
        if not self.warmup:
            return self.max_rate
        if not total:
            raise PlanError(
                "MaskedThought.warmup is a part of the run, but the number of its steps is not known here.",
                "Set max_steps, or MaskedThought.warmup: 0.",
            )
        return self.max_rate * min(1.0, step / (self.warmup * total))

    def masked(self, row: TokenRow, rate: float, step: int, ctx: Context) -> TokenRow:
        """The row with wrong tokens to read and its own targets."""
        seed = hashlib.sha256(f"MaskedThought/{ctx.seed}/{step}/".encode() + row.key).digest()
        draw = np.random.default_rng(int.from_bytes(seed[:8], "little"))
        hit = row.scored & (draw.random(len(row.ids)) < rate)
        wrong = ctx.tokenizer.pad_token_id if self.fill == "pad" else draw.integers(0, _vocabulary(ctx), len(row.ids))
        return replace(row, ids=np.where(hit, wrong, row.ids), targets=row.predicted)


def _vocabulary(ctx: Context) -> int:
    return int(inner(ctx.model).config.get_text_config().vocab_size)
