"""DG-Hard: keep of each matrix's change the directions that stand out of noise, and drop the others.

    D = theta_tuned - theta_0, (m, n) with m <= n, else turned;   D = sum_j s_j u_j v_j^T
    tau = strength * omega(m / n) * median(s),   omega(b) = 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43
    theta = theta_0 + sum over s_j > tau of s_j u_j v_j^T

omega is the rule of Gavish and Donoho for noise of unknown size (from memory). The sum is the projection of D on the
u_j that stay, found from the eigenvectors of D D^T in fp64. Norms and biases keep their change (`vectors`). Stacks of
experts are taken matrix by matrix. Done twice it may cut again, since the median is another one.
`control` is no repair: it shrinks each whole change to the norm that the repair would leave. A repair that does not
beat it owes its effect to the norm alone.
Only for full tuning: the change of a low-rank adapter has a median of 0 and is kept whole.
Cost: an eigenproblem of order min(m, n) for each matrix. Combine with: WiSEFT or LiNeS behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.merge._spectrum import shrunk
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class DGHard(Method):
    """Hard threshold on the singular values of a change (Spectral Unforgetting, 2026)."""

    strength: float = 1.0  # ours: times the rule's threshold; 0 keeps all
    vectors: bool = True  # ours: whether tensors of one dimension keep their change
    control: bool = False  # ours

    confined: ClassVar = True
    paper: ClassVar = Paper("Spectral Unforgetting", "2605.20296", "read in a summary only; the rule is from memory")
    does: ClassVar = "drops directions of the change that look like noise afterwards"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return self.strength == 0 and self.vectors

    def check(self, ctx: Context) -> None:
        if self.strength < 0:
            raise PlanError(f"DGHard.strength is {self.strength}.", "Use 0 (keep all) or more; 1 is the rule.")

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        base, tuned = weights["base"], weights["tuned"]
        if base.ndim < 2:
            return tuned if self.vectors else base
        kept = self._kept((tuned - base).double()).to(base.dtype)
        return shrunk(base, tuned, torch.linalg.vector_norm(kept)) if self.control else base + kept

    def _kept(self, change: torch.Tensor) -> torch.Tensor:
        """What stays of a change (..., m, n)."""
        tall = change.shape[-2] > change.shape[-1]
        d = change.mT if tall else change
        values, u = torch.linalg.eigh(d @ d.mT)
        s = values.clamp(min=0).sqrt()
        tau = self.strength * omega(d.shape[-2] / d.shape[-1]) * s.quantile(0.5, dim=-1, keepdim=True)
        u = u * (s > tau).unsqueeze(-2)
        kept = u @ (u.mT @ d)
        return kept.mT if tall else kept


def omega(ratio: float) -> float:
    """The threshold over the median singular value, for a matrix with `ratio` = rows / columns <= 1."""
    return 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
