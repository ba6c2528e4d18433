"""Task arithmetic: add the changes of several tuned models to the base, or take one away.

    theta = theta_0 + scale * sum_i w_i (theta_i - theta_0)

Without other models this walks along one change: a scale above 1 exaggerates it, one below 0 goes the other way
(negation: tune on what is not wanted, then subtract it; that also takes general skill, so look at the report).
The paper takes the scale from a grid by held-out scores; `holdfast` reports the one you choose.
Cost: one pass over the weights of all models. Combine with: LiNeS or TIES behind it. On LoRA use WiSEFT, which scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.merge._changes import by_place, changes
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    """Editing models with task arithmetic (Ilharco et al., ICLR 2023)."""

    models: tuple[str, ...] = ()  # hub ids, folders or adapters tuned from the same base; beside the run's own
    scale: float = 0.4  # lambda; the paper searches 0 to 1
    weights: tuple[float, ...] = ()  # w: the run's own, then one for each of `models`; (): all 1

    paper: ClassVar = Paper("Editing Models with Task Arithmetic", "2212.04089", "the default scale is from memory")
    does: ClassVar = "adds the changes of tuned models to the base afterwards, or subtracts them"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return not self.models and self.scale * sum(self.weights or (1,)) == 1

    def check(self, ctx: Context) -> None:
        wanted = 1 + len(self.models)
        if self.weights and len(self.weights) != wanted:
            raise PlanError(
                f"TaskArithmetic.weights has {len(self.weights)} numbers for the run's own model and "
                f"{len(self.models)} others.",
                f"Give {wanted}, the run's own first, or none.",
            )

    def entrywise(self) -> bool:
        return True

    def others(self) -> Mapping[str, str]:
        return by_place(self.models)

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        taus = [tau for _, tau in changes(weights)]
        return weights["base"] + self.scale * sum(
            w * tau for w, tau in zip(self.weights or (1.0,) * len(taus), taus, strict=True)
        )
