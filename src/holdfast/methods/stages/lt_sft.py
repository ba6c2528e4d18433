"""LT-SFT: full tuning shows which entries move most; then the base is tuned again with these alone.

    stage 1  tune everything: theta_0 -> theta_1
    mask     the k entries of largest |theta_1 - theta_0|, all tensors together; k = density * (entries that train)
    stage 2  begin again at theta_0 with a new optimizer, and train only the k entries: theta_2

So theta_2 - theta_0 has at most k entries other than 0; such differences add up (the paper composes those of tasks and
languages). Norms and the head (with tied embeddings the table too) do not train, as in the paper.
Differences from the paper: entries that moved as far as the last one chosen are taken in the order of the tensors
until there are k, where the official code takes them all; one round instead of a choice of several; no L1 pull to
theta_0 (`L2ToInit` is a pull).
Cost: the steps are split between two stages; a copy of the base; moments are dense.
Combine with: every loss and data method. Do not combine with: LoRA, ProMoT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Stage, State
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class LTSFT(Method):
    """Lottery-ticket sparse fine-tuning (ACL 2022), arXiv 2110.07560."""

    density: float = 0.05  # the paper's k is about 4 to 8 % of its models
    full_share: float = 0.5  # ours: part of the steps that shows what moves

    confined: ClassVar = True
    paper: ClassVar = Paper("Composable Sparse Fine-Tuning for Cross-Lingual Transfer", "2110.07560",
                            "no results for language models of this kind")  # fmt: skip
    does: ClassVar = "tunes once to see which entries move most, then again from the base with these alone"
    needs: ClassVar = frozenset({"dense", "base_weights"})

    def check(self, ctx: Context) -> None:
        if not 0 < self.density <= 1:
            raise PlanError(f"LTSFT.density is {self.density}.", "Use a part of the entries, above 0 and at most 1.")
        if not 0 < self.full_share < 1:
            raise PlanError(f"LTSFT.full_share is {self.full_share}.", "Use a part between 0 and 1.")

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
        for module in (*norms, inner(model).get_output_embeddings()):
            for p in module.parameters():
                p.requires_grad_(False)
        return model

    def stages(self) -> tuple[Stage, ...]:
        return Stage("full", self.full_share), Stage("sparse", 1 - self.full_share, restart=True)

    def stage_ends(
        self, stage: Stage, params: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], state: State
    ) -> State:
        total = sum(p.numel() for p in params.values())
        chosen = most_moved(params, base, max(1, round(self.density * total)))
        return {f"chosen/{name}": where for name, where in chosen.items()}

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor | None:
        if f"chosen/{name}" not in state:
            return None
        mask = torch.zeros(param.numel(), dtype=torch.bool, device=param.device)
        mask[state[f"chosen/{name}"].to(param.device)] = True
        return mask.view_as(param)


def most_moved(now: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Name -> flat positions of the k entries that moved most, all tensors together; those that stood still never."""
    best = torch.zeros(0)
    for name in now:
        best = torch.cat([best.to(now[name].device), _moved(now, base, name)])
        best = best.topk(min(k, len(best))).values
    edge = best.min()
    left, chosen = k - int((best > edge).sum()), {}  # how many of those that moved exactly as far as the last
    for name in now:
        moved = _moved(now, base, name)
        equal = (moved == edge) & (moved > 0)
        first = equal & (equal.cumsum(0) <= left)
        left -= int(first.sum())
        chosen[name] = ((moved > edge) | first).nonzero()[:, 0]
    return chosen


def _moved(now: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return (now[name].float() - base[name].float()).abs().flatten()
