"""SkillGraft: of all that tuning changed, put only the few largest changes onto the base (skill localisation).

    theta = theta_0 + g * (theta_tuned - theta_0),   g = 1 on the largest |theta_tuned - theta_0| of all tensors
    at most `share` of the entries, so of equal ones beyond it none is taken;   embeddings and head stay the base's

The paper finds that about 0.01 % of the entries can keep more than 95 % of the tuned accuracy. That is after training
the mask on the task (`runs/graft.py`); this is where its training starts, the largest changes alone, which it uses as
the baseline: a merge sees no data. Expect to need a larger share, above all behind AdamW (the authors tune with SGD;
from memory). Sizes are counted in bins 2^-12 wide, and a bin that does not fit whole is left out.
Unlike `TIES` with one model, which takes all of a bin, may trim each tensor alone and changes embeddings too.
Cost: two passes over the weights. Combine with: everything that trains the model's own weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.engine.ranks import counted, within
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, layer_of
from holdfast.services import Context, State

COUNTS = "counts"


@dataclass(frozen=True, kw_only=True)
class SkillGraft(Method):
    """Task-specific skill localisation (Panigrahi et al., ICML 2023), its patch of largest changes."""

    share: float = 1e-4  # 0.01 %, the paper's region after its mask was trained
    embeddings: bool = False  # whether embeddings and head are grafted too; the paper leaves them

    confined: ClassVar = True
    paper: ClassVar = Paper("Task-Specific Skill Localization in Fine-tuned Language Models", "2302.06600",
                            "the mask is not trained; read in its code")  # fmt: skip
    does: ClassVar = "keeps only the few largest changes of all afterwards"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return self.share == 1 and self.embeddings

    def check(self, ctx: Context) -> None:
        if not 0 < self.share <= 1:
            raise PlanError(f"SkillGraft.share is {self.share}.", "Use a share above 0, at most 1.")

    def entrywise(self) -> bool:
        return True

    def takes(self, name: str, num_dims: int) -> bool:
        """Whether a tensor is grafted: all but the matrices outside of the blocks."""
        return self.embeddings or num_dims < 2 or layer_of(name) is not None

    def survey(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> State | None:
        if not self.takes(name, weights["base"].ndim):
            return {f"left/{name}": torch.tensor(True)}
        return {COUNTS: state.get(COUNTS, 0) + counted(weights["tuned"] - weights["base"])}

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        if f"left/{name}" in state:
            return weights["base"]
        tau = weights["tuned"] - weights["base"]
        return torch.where(tau.abs() >= within(state[COUNTS], self.share), weights["tuned"], weights["base"])
