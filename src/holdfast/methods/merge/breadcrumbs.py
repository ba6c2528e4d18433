"""Model Breadcrumbs: of each tensor's change drop the largest entries (outliers) and the smallest (noise), and add.

    by magnitude, in each tensor of N entries: the int(outliers * N) largest go, of the rest the int(density * N)
    largest stay, all others go
    theta = theta_0 + scale * sum_i masked tau_i,   tau_i = theta_i - theta_0

Where outliers and density together exceed 1, all but the outliers stay. Norms and biases are masked like matrices.
Cost: a few passes over the weights of all models. Combine with: LiNeS or WiSEFT behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.engine.ranks import largest
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.merge._changes import by_place, changes
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Method):
    """Sparse masks of both tails (Davari and Belilovsky, ECCV 2024)."""

    models: tuple[str, ...] = ()  # hub ids, folders or adapters tuned from the same base; beside the run's own
    density: float = 0.15  # the share that stays; the paper masks 85 to 90 % (from memory)
    outliers: float = 0.01  # the share of the largest that goes; mergekit's gamma
    scale: float = 1.0  # alpha; about 0.3 for many models (from memory)

    confined: ClassVar = True
    paper: ClassVar = Paper("Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", "2312.06795",
                            "defaults from memory; mergekit's code was read, not the authors'")  # fmt: skip
    does: ClassVar = "drops the largest and the smallest changes afterwards"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return not self.models and self.density == 1 and self.outliers == 0 and self.scale == 1

    def check(self, ctx: Context) -> None:
        if not 0 < self.density <= 1:
            raise PlanError(f"Breadcrumbs.density is {self.density}.", "Use a share above 0, up to 1.")
        if not 0 <= self.outliers < 1:
            raise PlanError(f"Breadcrumbs.outliers is {self.outliers}.", "Use a share from 0, below 1.")

    def others(self) -> Mapping[str, str]:
        return by_place(self.models)

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        base, total = weights["base"], torch.zeros_like(weights["base"])
        for _, tau in changes(weights):
            if tau.any():  # an adapter leaves whole tensors as they are
                total += self._masked(tau)
        return base + self.scale * total

    def _masked(self, tau: torch.Tensor) -> torch.Tensor:
        outliers, kept = (int(share * tau.numel()) for share in (self.outliers, self.density))
        return tau * (largest(tau, outliers + kept) & ~largest(tau, outliers))
