"""OnPolicyKL: KL to the base on answers that the model itself gives, to prompts of the task.

    y ~ p(.|x): sampled from the model so far, for prompts x of the step's rows
    loss += weight * mean_t KL(p(.|x, y_<t) || p_base(.|x, y_<t))       direction "reverse"
    loss += weight * mean_t KL(p_base(.|x, y_<t) || p(.|x, y_<t))       direction "forward"

KLToBase compares at the given answers' tokens, where the model is meant to change; here it is compared at what it says
so far, so what is new in the given answers is learnt from them and the way the model writes stays the base's. This is
the penalty of reinforcement learning, as a term beside the task's loss; no gradient goes through the sampling. A
variant of learning without forgetting: no paper defines it in this place, and all defaults are ours.
Every `every`-th step the first `prompts` rows are answered; the term's weight is not scaled for that.
Cost: generations and two forwards of their tokens in such a step; a copy of the base unless an adapter is trained.
Combine with: LoRA, Freeze, Replay, every token weight. Do not combine with: ProMoT (the base has no prompt).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from holdfast.data.asked import Reader
from holdfast.data.encoder import encoder_of
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Rollouts, State, Term
from holdfast.methods.loss._divergence import KINDS
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class OnPolicyKL(Method):
    """KL to the base on the model's own answers (a variant of arXiv 1606.09282)."""

    weight: float = 0.5  # ours, as KLToBase's
    direction: str = "reverse"  # ours: that of the samples
    prompts: int = 2  # ours: of each step that answers
    every: int = 1  # ours
    temperature: float = 1.0  # ours
    max_new_tokens: int = 64  # ours

    paper: ClassVar = Paper("Learning without Forgetting", "1606.09282",
                            "the term on own answers is ours; no paper defines it here")  # fmt: skip
    does: ClassVar = "holds the output distribution near the base's on the model's own answers"
    strengths: ClassVar = ("weight",)
    needs: ClassVar = frozenset({"base_logits"})
    refuses: ClassVar = {"ProMoT": "ProMoT reads the task with a soft prompt, which the base lacks."}

    def off(self) -> bool:
        return self.weight == 0 or self.prompts == 0

    def check(self, ctx: Context) -> None:
        if self.direction not in KINDS:
            raise PlanError(f"OnPolicyKL.direction is {self.direction!r}.", f"Use one of: {', '.join(KINDS)}.")
        if self.weight < 0 or min(self.prompts, self.every, self.max_new_tokens) < 1 or self.temperature < 0:
            what = "OnPolicyKL needs weight and temperature of 0 or more, and prompts, every and max_new_tokens of 1."
            raise PlanError(what, "Mend them.")

    def rollouts(self, rows: Sequence[TokenRow], step: int, ctx: Context, state: State) -> Rollouts | None:
        if step % self.every:
            return None
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        asked = [a for r in rows if r.of_task and (a := reader.read(r))][: self.prompts]
        if not asked:
            return None
        lines = ("\n",) if all(a.one_line for a in asked) else ()
        prompts = [a.ids for a in asked]
        return Rollouts(prompts, prompts, temperature=self.temperature, max_new_tokens=self.max_new_tokens, stop=lines)

    def loss(self, view: View) -> Term | None:
        at = view.positions(self.name)
        if not len(at):
            return None
        return Term(self.weight * KINDS[self.direction](view.teacher_logp(self.name), view.logp[at]), self.name)
