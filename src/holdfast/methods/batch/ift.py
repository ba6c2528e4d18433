"""IFT: let the model read its own guesses beside the answer, and weigh a token by the losses that follow it.

    x'_t = argmax p(.|x_<t)    for t in the answer, else x_t          its guesses, no gradient
    e_t = (1 - lam) E(x_t) + lam E(x'_t)                              what is read; targets stay x
    l_t = -log p(x_t|e_<t)     S_t = sum_{s >= t} gamma^(s-t) l_s     over the n tokens of a row's answer
    W_t = n S_t / sum_s S_s    loss = mean_t W_t l_t

A guess that leads astray costs what follows, and the token before it is taught more. The weights of a row average 1.
`detach` false, as in the released code, lets gradients go through W as well; true makes W a plain weight.
gamma 0 leaves all weights at 1, as the released code's readme says (by the formula a token would be weighed by its own
loss); with lam 0 that is plain fine-tuning. Not from the paper: it averages over each row's tokens and then over rows,
here over all tokens of the step, as every loss here. The released code looks tokens up in a frozen copy of the base's
table, here the model reads its own, with gradient, as it will at inference: with an adapter on its layers the two are
the same. Left out: schedules of lam, other norms of W.
The gradient through W is a term of its own beside the task's: weights of other methods multiply the task's loss alone.
The paper has no measure of forgetting.
Cost: one more forward without gradient. Combine with: LoRA, Replay, KLToBase, ICLAnchor. A model that looks tokens up
again in its layers is refused. Do not combine with: SDFT, which does not run the task's own answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.measure.soft_prompt import check_reading
from holdfast.method import Method, Paper, Term
from holdfast.services import Context, Look, View

BLOCK = 256  # tokens whose sums are one product


@dataclass(frozen=True, kw_only=True)
class IFT(Method):
    """Intuitive fine-tuning (Hua et al. 2024), arXiv 2405.11870.

    Raises:
        PlanError: lam or gamma outside of 0 to 1, or a model that cannot read embeddings.
    """

    lam: float = 0.2  # released code
    gamma: float = 0.95  # released code
    detach: bool = False  # released code

    paper: ClassVar = Paper("Intuitive Fine-Tuning: Towards Unifying SFT and RLHF into a Single Process", "2405.11870",
                            "read in summaries and in the released code")  # fmt: skip
    does: ClassVar = "reads the model's own guesses beside the answers and weighs tokens by the losses that follow"
    strengths: ClassVar = ("lam",)
    odds: ClassVar = strengths
    needs: ClassVar = frozenset({"live_logits"})
    writes: ClassVar = frozenset({"blend"})
    whole_rows: ClassVar = True
    refuses: ClassVar = {"SDFT": "SDFT does not run the task's own answers, which IFT reads and weighs."}

    def off(self) -> bool:
        return self.lam == 0 and self.gamma == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.lam < 1 or not 0 <= self.gamma <= 1:
            what = f"IFT.lam is {self.lam} and gamma is {self.gamma}."
            raise PlanError(what, "Use 0 or more, lam below 1 and gamma up to 1.")
        if self.lam:
            check_reading(ctx.model, ctx.tokenizer, self.name, does="mixes embeddings of two tokens")

    def batch(self, rows: Sequence[TokenRow], step: int, look: Look) -> Sequence[TokenRow]:
        mine = [r for r in rows if r.of_task and r.num_scored] if self.lam else []
        if not mine:
            return rows
        guesses = (z.argmax(-1).cpu().numpy() for z in look.logits(mine))
        return [self.blended(r, next(guesses)) if r.of_task and r.num_scored else r for r in rows]

    def blended(self, row: TokenRow, guesses: np.ndarray) -> TokenRow:
        """The row read together with `guesses` (n,) at its n scored tokens."""
        other = row.ids.copy()
        other[row.scored] = guesses
        return replace(row, blend=other, blend_share=self.lam)

    def token_weight(self, view: View) -> torch.Tensor | None:
        return self.weights(view, -view.token_logp.detach()) if self.detach and self.gamma else None

    def loss(self, view: View) -> Term | None:
        at = view.positions("task")
        if self.detach or not self.gamma or not len(at):
            return None
        losses = -view.token_logp
        return Term(((self.weights(view, losses) - 1) * losses)[at], "task")

    def weights(self, view: View, losses: torch.Tensor) -> torch.Tensor:
        """(N,) W at the positions of the task's own rows, 1 at all others; `losses` (N,)."""
        out = []
        for row, part in zip(view.packed.rows, view.packed.by_row(losses), strict=True):
            sums = discounted(part, self.gamma) if row.of_task else torch.ones_like(part)
            whole = sums.sum()
            out.append(len(part) * sums / whole if float(whole.detach()) > 0 else torch.ones_like(part))
        return torch.cat(out)


def discounted(losses: torch.Tensor, gamma: float) -> torch.Tensor:
    """(n,) for each t the sum over s >= t of gamma^(s-t) losses_s."""
    if not len(losses):  # a row of the task without a target
        return losses
    out: list[torch.Tensor] = []
    after = losses.new_zeros(())
    for part in reversed(losses.split(BLOCK)):
        ahead = torch.arange(len(part), device=part.device)
        far = ahead[None] - ahead[:, None]
        own = torch.where(far >= 0, gamma ** far.clamp(min=0).to(part.dtype), 0.0) @ part
        out.append(own + gamma ** (len(part) - ahead).to(part.dtype) * after)
        after = out[-1][0]
    return torch.cat(out[::-1])
