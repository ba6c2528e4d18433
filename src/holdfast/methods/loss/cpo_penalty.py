"""CPOPenalty (experimental): a price on moving the entries that matter most to what the base does already.

    loss += weight * mean_{j in M} |theta_j - theta0_j|,   M: the `share` largest |theta0| of every matrix

The absolute value pulls with the same force however little an entry has moved, so most protected entries stay where
they are while the rest of the matrix learns. CPO is a method of reinforcement learning over a sequence of tasks; this
is its movement penalty alone, beside any loss. The form (a masked L1 distance to the weights before the task, the
share of 10 % and the weight of 100) is the paper's, read in a summary. Unverified and ours: which entries are
protected (the paper's rule was not readable; a run has one task, so size stands for what earlier tasks moved) and the
division by their number.
With LoRA the change s B A is multiplied out, one module at a time, again in the backward. Weight decay pulls to zero:
leave it at 0.
Cost: one bit for each entry; dense: a copy of the trained weights. LoRA: a product of the size of each weight in every
micro-batch. Combine with: everything at parameter level.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from holdfast.engine.shards import cut_like
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, State, Term, canonical
from holdfast.methods.loss._weights import changes, wanted
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class CPOPenalty(Method):
    """The movement penalty of continual policy optimization (Luo et al. 2026), arXiv 2607.04364."""

    weight: float = 100.0  # the paper's lambda; ours: of the mean over protected entries
    share: float = 0.1  # the paper's p
    patterns: tuple[str, ...] = ()  # only names matching one of these; () is every matrix

    paper: ClassVar = Paper("RL Forgets! Towards Continual Policy Optimization", "2607.04364",
                            "read in a summary; which entries are protected is ours")  # fmt: skip
    does: ClassVar = "penalises any movement of the largest tenth of the weights (experimental)"
    strengths: ClassVar = ("weight",)
    needs: ClassVar = frozenset({"base_weights"})

    def off(self) -> bool:
        return self.weight == 0

    def check(self, ctx: Context) -> None:
        if self.weight < 0:
            raise PlanError(f"CPOPenalty.weight is {self.weight}: that pushes away.", "Use 0 or more.")
        if not 0 < self.share <= 1:
            raise PlanError(f"CPOPenalty.share is {self.share}.", "Use a part of each matrix, above 0 and at most 1.")
        if not all(p.is_floating_point() and not hasattr(p, "quant_state") for p in ctx.model.parameters()):
            raise PlanError(
                "CPOPenalty looks at the base's weights, but the base model is loaded in 4 or 8 bits.",
                "Load it unquantised, or use L2ToInit beside LoRA.",
            )

    @torch.no_grad()
    def prepare(self, ctx: Context) -> State:
        named = ((canonical(n), p) for n, p in ctx.model.named_parameters() if p.ndim >= 2)
        return {f"protected/{n}": largest(p, self.share) for n, p in named if wanted(n, self.patterns)}

    def loss(self, view: View) -> Term | None:
        terms, count = [], 0
        for name, change in changes(view, self.patterns):
            if f"protected/{name}" not in view.state:
                continue
            mask = view.state[f"protected/{name}"]
            terms.append(checkpoint(_movement, change, mask, use_reentrant=False))
            count += int(mask.sum())
        return Term(self.weight * torch.stack(terms).sum() / count) if terms else None


def largest(weight: torch.Tensor, share: float) -> torch.Tensor:
    """Bool of the weight's shape: the `share` entries of largest size, at least one."""
    size = weight.abs().flatten()
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.topk(max(1, round(share * size.numel()))).indices] = True
    return mask.view(weight.shape)


def _movement(change: Callable[[], torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    moved = change()
    return (cut_like(mask.to(moved.device, moved.dtype), moved) * moved.abs()).sum()
