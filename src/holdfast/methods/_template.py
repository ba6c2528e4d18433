"""Z-loss: keep the softmax normaliser near 1, so that logits do not drift upwards together.

    loss += weight * mean_t (log Z_t)^2,   Z_t = sum_v exp(z_tv),   z_t = logits at answer position t

This is the template of a new method, and it works. Copy it to the folder of its site (methods/loss/z_loss.py); files
whose name begins with "_" are not registered. Say here what the paper does that the code does not: PaLM used the term
in pre-training; a model that was trained without it has log Z far from 0 and will be moved at first.
Cost: none, the logits are there already. Combine with: everything.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Term
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class ZLoss(Method):
    """Auxiliary z-loss (Chowdhery et al. 2022), section on training setup."""

    weight: float = 1e-4  # PaLM

    paper: ClassVar = Paper("PaLM: Scaling Language Modeling with Pathways", "2204.02311")
    does: ClassVar = "keeps the softmax normaliser near 1"
    strengths: ClassVar = ("weight",)

    def off(self) -> bool:
        return self.weight == 0

    def check(self, ctx: Context) -> None:
        if self.weight < 0:
            raise PlanError(f"ZLoss.weight is {self.weight}.", "Use 0 or more.")

    def loss(self, view: View) -> Term:
        log_z = view.logits[view.positions("task")].float().logsumexp(-1)  # (M,)
        return Term(self.weight * log_z.square(), "task")  # the host divides by the step's answer tokens
