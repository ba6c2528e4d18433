"""WiSE-FT: after training, walk part of the way back to the base in a straight line.

    theta = (1 - alpha) theta_0 + alpha theta_tuned

alpha 1 keeps the tuned model, 0 is the base, both exactly. On a LoRA adapter the same as multiplying its scale by
alpha, exact, no merging. The arithmetic is fp32: in bf16 the small difference would round away.
The paper evaluates a grid of alpha; `holdfast` reports the one you choose (the sweep belongs to repair).
`parts` is ours: an alpha for each equal part of the depth; embeddings, final norm and head keep `alpha`.
Cost: one pass over the weights. Combine with: everything; the last step of any recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, layer_of
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class WiSEFT(Method):
    """Weight-space ensembling (Wortsman et al., CVPR 2022)."""

    alpha: float = 0.5  # the authors' advice when nothing is known (secondary source)
    parts: tuple[float, ...] = ()  # ours: alpha of the blocks, cut into as many equal parts, lowest first; (): alpha

    paper: ClassVar = Paper(
        "Robust fine-tuning of zero-shot models", "2109.01903", "defaults checked in a secondary source only"
    )
    does: ClassVar = "averages the tuned weights with the base afterwards"
    needs: ClassVar = frozenset({"base_weights"})
    scales_update: ClassVar = True

    def off(self) -> bool:
        return self.alpha == 1 and all(a == 1 for a in self.parts)

    def check(self, ctx: Context) -> None:
        for name, alpha in (("alpha", self.alpha), *(("parts", a) for a in self.parts)):
            if not 0 <= alpha <= 1:
                raise PlanError(f"WiSEFT.{name} is {alpha}.", "Use a number from 0 (base) to 1 (tuned).")

    def factor(self, name: str, num_layers: int) -> float:
        """alpha of one tensor."""
        layer = layer_of(name)
        if layer is None or not self.parts:
            return self.alpha
        return self.parts[layer * len(self.parts) // num_layers]

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        return torch.lerp(weights["base"], weights["tuned"], self.factor(name, num_layers))
