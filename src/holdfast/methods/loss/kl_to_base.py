"""KL to the base model (LwF, prediction distillation), on the task's answers or on replayed text.

    loss += weight * mean_t KL(p_base(.|c_t) || p(.|c_t))       direction "forward" (LwF; covers what the base knew)
    loss += weight * mean_t KL(p(.|c_t) || p_base(.|c_t))       direction "reverse" (as in RL; sticks to its modes)

on = "task": the task's own answer tokens. on = "replay": `rows_per_step` rows of general text a step, all tokens; the
term is then a mean over those. KL on the task's tokens does not control drift on other inputs (see the leaderboard),
and a large weight there blocks learning exactly the tokens you want to learn.
The base's answers are computed once and stored as hidden states (exact), or the adapter is switched off.
Cost: task: one base forward over the rows. replay: those rows' tokens in each step.
Do not combine with: AnchoredSFT (contained); ProMoT when on = "task".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Term
from holdfast.methods.data._few import in_turn
from holdfast.methods.data.replay import GENERAL, read_sources
from holdfast.methods.loss._divergence import KINDS
from holdfast.methods.loss._on_task import REFUSES
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class KLToBase(Method):
    """Learning without forgetting for language models: arXiv 1606.09282; "PredKD" of arXiv 2203.17269."""

    weight: float = 0.5  # the SFT+KL baseline of arXiv 2601.02151
    direction: str = "forward"  # LwF
    on: str = "task"
    sources: tuple[str, ...] = GENERAL  # for "replay"
    rows_per_step: int = 2  # ours
    max_tokens: int = 96  # ours; replayed rows are cut here

    paper: ClassVar = Paper("Learning without Forgetting", "1606.09282")
    does: ClassVar = "holds the output distribution near the base's"
    strengths: ClassVar = ("weight",)
    needs: ClassVar = frozenset({"base_logits"})

    @property
    def refuses(self):  # type: ignore[override]
        return REFUSES if self.on == "task" else {}

    def off(self) -> bool:
        return self.weight == 0

    def check(self, ctx: Context) -> None:
        if self.direction not in KINDS:
            raise PlanError(f"KLToBase.direction is {self.direction!r}.", f"Use one of: {', '.join(KINDS)}.")
        if self.on not in ("task", "replay"):
            raise PlanError(f"KLToBase.on is {self.on!r}.", "Use 'task' or 'replay'.")
        if self.weight < 0:
            raise PlanError(f"KLToBase.weight is {self.weight}.", "Use 0 or more.")

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        if self.on == "task":
            return ()
        rows = read_sources(self.sources, ctx, owner=self.name, all_tokens=True)
        return [r.cut(self.max_tokens) for r in rows]

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        return in_turn(step, self.rows_per_step, pool)

    def loss(self, view: View) -> Term | None:
        owner = "task" if self.on == "task" else self.name
        at = view.positions(owner)
        if not len(at):
            return None
        return Term(self.weight * KINDS[self.direction](view.base_logp(owner), view.logp[at]), owner)
