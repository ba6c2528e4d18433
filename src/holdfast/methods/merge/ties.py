"""TIES: keep the largest changes of several tuned models, let their mass elect a sign, and average those who agree.

    tau_i = theta_i - theta_0, trimmed to the `density` largest magnitudes of its model (the others become 0)
    gamma = sign(sum_i tau_i)
    theta = theta_0 + scale * mean of tau_i over those i whose sign is gamma

Election and mean are PEFT's functions, with equal weights of the models, as in the paper. `trim: model` ranks all
numbers of a model together, as the released code does, to within 2^-12 of the threshold; `trim: tensor` ranks each
tensor alone, as PEFT and mergekit do (and drops tensors of fewer than 1 / density numbers whole). Where changes cancel
exactly, PEFT takes the positive ones. mergekit can weight models before the election: another rule.
Without other models the one tuned model is trimmed, and that is all.
Cost: one pass over the weights of all models, two with `trim: model`. Combine with: LiNeS or WiSEFT behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.engine.ranks import counted, threshold
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.merge._changes import by_place, changes
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class TIES(Method):
    """Trim, elect sign and merge (Yadav et al., NeurIPS 2023), Sec. 4."""

    models: tuple[str, ...] = ()  # hub ids, folders or adapters tuned from the same base; beside the run's own
    density: float = 0.2  # the paper's k = 20 %
    scale: float = 1.0  # lambda; the paper searches 0.1 to 1.5
    trim: str = "model"  # or "tensor"

    confined: ClassVar = True
    paper: ClassVar = Paper("TIES-Merging: Resolving Interference When Merging Models", "2306.01708",
                            "that exact ties are positive is PEFT's rule")  # fmt: skip
    does: ClassVar = "keeps the largest changes afterwards, and merges them with those of other models"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return not self.models and self.density == 1 and self.scale == 1

    def check(self, ctx: Context) -> None:
        if not 0 < self.density <= 1:
            raise PlanError(f"TIES.density is {self.density}.", "Use a share above 0, up to 1 (trim nothing).")
        if self.scale < 0:
            raise PlanError(f"TIES.scale is {self.scale}.", "Use 0 (base) or more.")
        if self.trim not in ("model", "tensor"):
            raise PlanError(f"TIES.trim is {self.trim!r}.", "Use model or tensor.")

    def others(self) -> Mapping[str, str]:
        return by_place(self.models)

    def entrywise(self) -> bool:
        return self.trim == "model" or self.density == 1

    def survey(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> State | None:
        if self.trim == "tensor" or self.density == 1:
            return None
        return {
            role: state[role].add_(counted(tau)) if role in state else counted(tau) for role, tau in changes(weights)
        }

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

        taus = [self._trimmed(role, tau, state) for role, tau in changes(weights)]
        if len(taus) == 1:  # it is elected, and is its own mean
            return weights["base"] + self.scale * taus[0]
        stack = torch.stack(taus)
        return weights["base"] + self.scale * disjoint_merge(stack, calculate_majority_sign_mask(stack))

    def _trimmed(self, role: str, tau: torch.Tensor, state: State) -> torch.Tensor:
        from peft.utils.merge_utils import prune

        if self.density == 1:
            return tau
        if self.trim == "tensor":
            return prune(tau, self.density, method="magnitude")
        return tau * (tau.abs() >= threshold(state[role], self.density))
