"""L2-to-init (L2-SP): pull every trained weight back to where it started.

    loss += (alpha / 2) * sum_j (theta_j - theta0_j)^2          dense
    loss += (alpha / 2) * sum_modules s^2 tr((B^T B)(A A^T))    LoRA: the same sum over s B A, from two r x r Grams

AdamW's weight decay pulls to zero instead, which hurts a pre-trained model: leave it at 0. Adam rescales the penalty's
gradient like every other gradient. The paper penalises attention only, in a vision model; here every trained weight
(`patterns` narrows it).
Cost: dense: one copy of the trained weights. LoRA: nothing.
Combine with: everything at parameter level.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Term
from holdfast.methods.loss._weights import lora_pairs, wanted
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class L2ToInit(Method):
    """L2 to the starting weights, arXiv 2203.17269 (Sec. 3; L2-SP is arXiv 1802.01483)."""

    alpha: float = 1e-2  # ours: the paper tunes it on a short prefix of the task
    patterns: tuple[str, ...] = ()  # only names matching one of these; () is all that trains

    paper: ClassVar = Paper("A Closer Look at Rehearsal-Free Continual Learning", "2203.17269")
    does: ClassVar = "penalises the squared distance of the weights from the base"
    strengths: ClassVar = ("alpha",)
    needs: ClassVar = frozenset({"base_weights"})

    def off(self) -> bool:
        return self.alpha == 0

    def check(self, ctx: Context) -> None:
        if self.alpha < 0:
            raise PlanError(f"L2ToInit.alpha is {self.alpha}: a negative pull pushes away.", "Use 0 or more.")

    def loss(self, view: View) -> Term | None:
        terms = []
        for name, p in view.params.items():
            if ".lora_" not in name and name in view.base_weights and wanted(name, self.patterns):
                terms.append(_distance(p, view.base_weights[name]))
        for name, a, b, scale in lora_pairs(view):
            if wanted(name, self.patterns):
                terms.append(scale**2 * ((b.T @ b) * (a @ a.T)).sum())
        return Term(self.alpha / 2 * torch.stack(terms).sum()) if terms else None


def _distance(p: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Squared distance of two tensors."""
    if hasattr(p, "full_tensor"):  # a shard: its sum goes over processes, which autograd knows how to undo
        return (p - base.to(p.dtype)).square().sum()
    return _Distance.apply(p, base)


class _Distance(torch.autograd.Function):
    """sum (p - base)^2 with the fewest passes over memory: every weight of the model goes through it at every step."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        apart = p - base
        ctx.save_for_backward(apart)
        return torch.linalg.vector_norm(apart).square()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * (2 * grads[0]), None
