"""Model soup: the mean of several models tuned from the same base, the base itself among them if wanted.

    theta = (base * theta_0 + sum_i theta_i) / (base + number of models)

This is the uniform soup. The paper's greedy one asks for a score after each candidate, which no method may do; runs
with other `models` can be compared instead. With no other model and `base` 1 it is WiSE-FT at one half.
Cost: one pass over the weights of all models. Combine with: LiNeS behind it.
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
class ModelSoup(Method):
    """Uniform soup (Wortsman et al., ICML 2022)."""

    models: tuple[str, ...] = ()  # hub ids, folders or adapters tuned from the same base; beside the run's own
    base: int = 0  # how many times the base counts; 0: the paper's soup

    paper: ClassVar = Paper("Model soups: averaging weights of multiple fine-tuned models improves accuracy without "
                            "increasing inference time", "2203.05482")  # fmt: skip
    does: ClassVar = "averages the tuned weights with those of other models afterwards"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def check(self, ctx: Context) -> None:
        if self.base < 0:
            raise PlanError(f"ModelSoup.base is {self.base}.", "Use 0 or more.")
        if not self.models and not self.base:
            raise PlanError("ModelSoup has one model alone to average.", "Name others in models, or set base to 1.")

    def entrywise(self) -> bool:
        return True

    def others(self) -> Mapping[str, str]:
        return by_place(self.models)

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        taus = [tau for _, tau in changes(weights)]
        return weights["base"] + sum(taus) / (self.base + len(taus))
