"""LiNeS: scale the update of each layer, little at the bottom, fully at the top.

    tau = theta_tuned - theta_0
    lambda(l) = alpha + beta * l / (L - 1)   in block l of L (0-based);   lambda = alpha   outside the blocks
    theta = theta_0 + lambda * tau,   beta = 1 - alpha unless given

alpha 1 keeps the tuned model; alpha = a with beta = 0 is WiSE-FT. Embeddings, final norm and a tied head stand outside
the blocks and get alpha, as in the released code (which matches names by the substring ".i."; here the block index is
parsed, so experts do not confuse it). On LoRA the adapter's B is scaled, exact. The paper searches alpha on a grid.
Cost: one pass over the weights. Combine with: everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, layer_of
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class LiNeS(Method):
    """Layer-increasing scaling (Wang et al., ICLR 2025), Sec. 3."""

    alpha: float = 0.5  # ours: the paper takes it from a grid of 0.0 to 1.0
    beta: float | None = None  # None: 1 - alpha, the single-task rule

    paper: ClassVar = Paper("LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging",
                            "2410.17146")  # fmt: skip
    does: ClassVar = "scales the change of lower layers down afterwards"
    needs: ClassVar = frozenset({"base_weights"})
    scales_update: ClassVar = True

    def off(self) -> bool:
        return self.alpha == 1 and not self.beta

    def check(self, ctx: Context) -> None:
        if not 0 <= self.alpha <= 1:
            raise PlanError(f"LiNeS.alpha is {self.alpha}.", "Use a number from 0 to 1.")

    def factor(self, name: str, num_layers: int) -> float:
        """lambda of one tensor."""
        layer = layer_of(name)
        if layer is None:
            return self.alpha
        beta = 1 - self.alpha if self.beta is None else self.beta
        return self.alpha + beta * layer / max(1, num_layers - 1)

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        return torch.lerp(weights["base"], weights["tuned"], self.factor(name, num_layers))
