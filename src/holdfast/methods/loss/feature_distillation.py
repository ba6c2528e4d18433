"""FeatureDistillation: hold the hidden states of chosen layers near the base's.

    loss += weight * mean_t sum_l |h_lt - h0_lt|^2 / |h0_lt|^2       relative (ours)
    loss += weight * mean_t sum_l |h_lt - h0_lt|^2 / D               plain: the mean square over D dimensions

h, h0: states (D,) of the model and of the base in layer l at position t; no gradient through the base's. Layers count
from 0; -1 is what enters the output head, behind the final norm. Scales differ by layer and model, and a few outlier
dimensions dominate a plain square, hence the division.
on = "task": the task's answer tokens. on = "replay": `rows_per_step` rows of general text a step, all tokens.
The form of two stages is not built (arXiv 2210.02871: the base trained further is the teacher, and a student begins
again at the base with |h_student - h_teacher|^2 beside its loss): a teacher here is the base, or gives logits alone.
It blocks more than a KL does: states may differ where the answers do not. The comparison of arXiv 2203.17269 found it
weaker than distilling predictions (KLToBase). Its place is where predictions cannot be compared.
Cost: task: one base forward over the rows, and their states of these layers kept. replay: those rows' tokens in each
step. Combine with: everything at parameter level. Do not combine with: ProMoT or SDFT when on = "task".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.engine.pack import TokenRow
from holdfast.engine.ways import LAST, inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Term
from holdfast.methods.data._few import in_turn
from holdfast.methods.data.replay import GENERAL, read_sources
from holdfast.methods.loss._on_task import REFUSES
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class FeatureDistillation(Method):
    """Feature distillation ("FeatKD") as compared in arXiv 2203.17269."""

    weight: float = 1.0  # ours: the paper tunes it for each data set
    layers: tuple[int, ...] = (LAST,)  # ours
    relative: bool = True  # ours
    on: str = "task"  # the paper: the new task's data, without rehearsal
    sources: tuple[str, ...] = GENERAL  # for "replay"
    rows_per_step: int = 2  # ours
    max_tokens: int = 96  # ours; replayed rows are cut here

    paper: ClassVar = Paper("A Closer Look at Rehearsal-Free Continual Learning", "2203.17269",
                            "read in a summary; layers and scaling are ours")  # fmt: skip
    does: ClassVar = "holds hidden states near the base's"
    strengths: ClassVar = ("weight",)
    needs: ClassVar = frozenset({"base_hidden"})

    @property
    def refuses(self):  # type: ignore[override]
        return REFUSES if self.on == "task" else {}

    def off(self) -> bool:
        return self.weight == 0

    def check(self, ctx: Context) -> None:
        if self.on not in ("task", "replay"):
            raise PlanError(f"FeatureDistillation.on is {self.on!r}.", "Use 'task' or 'replay'.")
        if self.weight < 0 or self.rows_per_step < 1 or self.max_tokens < 2:
            what = "FeatureDistillation needs weight of at least 0, rows_per_step of at least 1 and max_tokens of 2."
            raise PlanError(what, "Mend them.")
        count = int(inner(ctx.model).config.get_text_config().num_hidden_layers)
        wrong = [n for n in self.layers if not LAST <= n < count]
        if wrong or not self.layers:
            what = f"FeatureDistillation.layers is {list(self.layers)}, but the model has layers 0 to {count - 1}."
            raise PlanError(what, "Name at least one of these, or -1 for what enters the head.")

    def hidden_layers(self) -> tuple[int, ...]:
        return self.layers

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        if self.on == "task":
            return ()
        rows = read_sources(self.sources, ctx, owner=self.name, all_tokens=True)
        return [r.cut(min(self.max_tokens, ctx.max_length)) for r in rows]

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        return in_turn(step, self.rows_per_step, pool)

    def loss(self, view: View) -> Term | None:
        owner = "task" if self.on == "task" else self.name
        if not len(view.positions(owner)):
            return None
        apart = [self.apart(view.hidden(owner, n), view.base_hidden(owner, n)) for n in self.layers]
        return Term(self.weight * torch.stack(apart).sum(0), owner)

    def apart(self, tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """(M,) squared distances of states (M, D), by the base's square or the number of dimensions."""
        base = base.float()
        whole = base.square().sum(-1).clamp(min=1e-12) if self.relative else base.shape[-1]
        return (tuned.float() - base).square().sum(-1) / whole
