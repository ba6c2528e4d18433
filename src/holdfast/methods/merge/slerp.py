"""SLERP: walk from the base, or from another tuned model, to the tuned weights along an arc, tensor by tensor.

    omega = the angle between theta_a and theta_b, each tensor flattened
    theta = sin((1 - t) omega) / sin(omega) theta_a + sin(t omega) / sin(omega) theta_b

theta_a is the other model (the base without one), theta_b the tuned one. Where the cosine of the angle lies above
0.9995, which includes most tensors of usual fine-tunes, the arc is a straight line, as in mergekit; so it is between
opposite tensors and from one of zeros. Between base and tuned model it is then WiSE-FT.
Cost: one pass over the weights. Combine with: TIES or TaskArithmetic before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context, State

STRAIGHT = 0.9995  # mergekit's


@dataclass(frozen=True, kw_only=True)
class SLERP(Method):
    """Spherical interpolation of models (Lu et al., 2024)."""

    model: str = ""  # hub id, folder or adapter tuned from the same base; "": the base itself
    t: float = 0.5  # 1: the tuned model

    paper: ClassVar = Paper("Fine-tuning large language models for domain adaptation", "2409.03444",
                            "mergekit's code was read, not the authors'")  # fmt: skip
    does: ClassVar = "walks along an arc between two models afterwards"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return self.t == 1

    def check(self, ctx: Context) -> None:
        if not 0 <= self.t <= 1:
            raise PlanError(f"SLERP.t is {self.t}.", "Use a number from 0 (the other model) to 1 (tuned).")

    def others(self) -> Mapping[str, str]:
        return {"start": self.model} if self.model else {}

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        a, b = weights.get("start", weights["base"]), weights["tuned"]
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        if cosine.abs() > STRAIGHT or not (a.any() and b.any()):
            return torch.lerp(a, b, self.t)
        omega = cosine.acos()
        return (((1 - self.t) * omega).sin() * a + (self.t * omega).sin() * b) / omega.sin()
