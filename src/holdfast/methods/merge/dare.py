"""DARE: drop most entries of each change at random, enlarge the others so that the mean stays, and add.

    m ~ Bernoulli(density) for each entry
    theta = theta_0 + scale * sum_i m_i * tau_i / density,   tau_i = theta_i - theta_0

Dropping and enlarging is PEFT's function. Masks depend on the seed of the run, the model's place and the tensor's
name, so every process and every resumed run draws the same. mergekit enlarges to the old L1 norm of each tensor: the
same in expectation. Works for the small changes of instruction tuning; the larger a change, the more noise.
Cost: one pass over the weights of all models. Combine with: LiNeS or WiSEFT behind it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.merge._changes import by_place, changes
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class DARE(Method):
    """Drop and rescale (Yu et al., ICML 2024), Sec. 3."""

    models: tuple[str, ...] = ()  # hub ids, folders or adapters tuned from the same base; beside the run's own
    density: float = 0.1  # 1 - p; the paper drops 90 to 99 % of one model's change
    scale: float = 1.0  # of the sum; 1 for one model

    paper: ClassVar = Paper("Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free "
                            "Lunch", "2311.03099")  # fmt: skip
    does: ClassVar = "drops most of the change at random afterwards, and enlarges the rest"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return not self.models and self.density == 1 and self.scale == 1

    def check(self, ctx: Context) -> None:
        if not 0 < self.density <= 1:
            raise PlanError(f"DARE.density is {self.density}.", "Use a share above 0, up to 1 (drop nothing).")

    def prepare(self, ctx: Context) -> State:
        return {"seed": torch.tensor(ctx.seed)}

    def others(self) -> Mapping[str, str]:
        return by_place(self.models)

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        base, total = weights["base"], torch.zeros_like(weights["base"])
        for role, tau in changes(weights):
            total += self._dropped(tau, f"{int(state['seed'])}/{role}/{name}")
        return base + self.scale * total

    def _dropped(self, tau: torch.Tensor, key: str) -> torch.Tensor:
        from peft.utils.merge_utils import prune

        if self.density == 1 or not tau.any():
            return tau
        with torch.random.fork_rng(devices=[]):  # on the CPU: other devices have other random numbers
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
            return prune(tau.cpu(), self.density, method="random", rescale=True).to(tau.device)
