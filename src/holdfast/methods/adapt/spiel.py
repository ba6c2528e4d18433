"""SpIEL: train a few entries of each matrix; those that moved least make room for those with the largest gradients.

    d = W - W_base, 0 outside of k = density * (entries of W) chosen entries, random at first
    candidates: the k entries of largest |gradient| at the first of `accumulate` steps, every `every` steps
    g = sum of their gradients over these steps
    drop the n entries of smallest |d|, grow the n candidates of largest |g| that were not kept;   an entry that is
    dropped and grown again goes on as it was;   n = k the first time, then rate * (1 - t / T) * k

The accumulated-gradient variant (SpIEL-AG). What leaves goes back to the base to the last bit, so the result differs
from the base in k entries of each matrix. Embeddings, head, norms and biases do not train.
Differences from the paper: moments are dense here, so the memory is that of full tuning (the paper's optimizer holds
2 k numbers); an entry that joins starts with moments of 0 and without a bias correction of its own (the official code
seeds them with the candidates' gradients and an age); weight decay pulls to 0, not to the base; |d| is that before the
last of the accumulating steps; candidates are those of whole steps, not of micro-batches.
Cost: gradients and moments are dense; a sort of each matrix's gradient every `every` steps.
Combine with: every loss and data method, HalfFineTune (intersection). Do not combine with: LoRA, LIFT.
"""

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer
from holdfast.methods.adapt._matrices import is_matrix, only_matrices
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class SpIEL(Method):
    """SpIEL-AG, arXiv 2401.16405."""

    density: float = 0.01  # the paper's fork of PEFT
    every: int = 20  # official code: steps from one choice to the next
    accumulate: int = 5  # official code: steps whose gradients are added up
    rate: float = 0.2  # official code: part that changes at a choice, falling to 0
    seed: int = 0

    confined: ClassVar = True
    paper: ClassVar = Paper("Scaling Sparse Fine-Tuning to Large Language Models", "2401.16405",
                            "its tables and what it says of forgetting were not verified")  # fmt: skip
    does: ClassVar = "trains a few entries of each matrix and moves them to where the gradients are"
    needs: ClassVar = frozenset({"dense", "base_weights", "gradients"})
    leaves: ClassVar = "return"

    def off(self) -> bool:
        return self.density == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.density <= 1 or not 0 <= self.rate <= 1:
            raise PlanError("SpIEL needs density and rate between 0 and 1.", "Mend them.")
        if not 1 <= self.accumulate <= self.every:
            what = f"SpIEL adds up gradients over {self.accumulate} of every {self.every} steps."
            raise PlanError(what, "Use accumulate of at least 1 and at most every.")

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        return only_matrices(model)

    def redraws(self, step: int) -> bool:
        return step == 0 or step % self.every == self.accumulate % self.every

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor | None:
        if not is_matrix(name, param):
            return None
        mask = torch.zeros(param.numel(), dtype=torch.bool, device=param.device)
        mask[self.chosen(name, param, state)] = True
        return mask.view_as(param)

    def chosen(self, name: str, param: torch.Tensor, state: State) -> torch.Tensor:
        """(k,) flat positions of the entries that train now."""
        found = state.get(f"chosen/{name}")
        if found is None:
            dice = torch.Generator().manual_seed(zlib.crc32(f"SpIEL/{self.seed}/{name}".encode()))
            found = torch.randperm(param.numel(), generator=dice)[: self.count(param)].sort().values
        return found.to(param.device)

    def count(self, param: torch.Tensor) -> int:
        return max(1, round(self.density * param.numel()))

    def steer(self, past: Past, state: State) -> Steer | None:
        at = past.step % self.every
        if at >= self.accumulate:
            return None
        kept: State = {}
        for name in (n for n in past.grads if is_matrix(n, past.params[n])):
            grad = past.grads[name].flatten().float()
            if at == 0 or f"sums/{name}" not in state:
                where = grad.abs().argsort(descending=True, stable=True)[: self.count(grad)]
                sums = grad[where]
            else:
                where = state[f"candidates/{name}"]
                sums = state[f"sums/{name}"] + grad[where]
            kept |= {f"candidates/{name}": where, f"sums/{name}": sums}
            if at == self.accumulate - 1:
                kept[f"chosen/{name}"] = self._choose(name, past, state, where, sums)
        return Steer(state=kept)

    def _choose(self, name: str, past: Past, state: State, where: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        param = past.params[name]
        active = self.chosen(name, param, state)
        size = (param - past.base[name]).flatten()[active].abs()
        falling = self.rate * max(0.0, 1 - (past.step + 1) / max(1, past.total))
        rate = falling if f"chosen/{name}" in state else 1.0
        return reselected(active, size, where, sums.abs(), int(rate * len(active)))


def reselected(
    active: torch.Tensor, size: torch.Tensor, candidates: torch.Tensor, score: torch.Tensor, n: int
) -> torch.Tensor:
    """(k,) positions after the choice, ascending.

    active: (k,) positions that train; size: (k,) |d| of them; candidates: (c,) positions, score: (c,) |g| of them;
    n: how many may go. As many leave, the smallest first, as new ones join.
    """
    order = size.argsort(stable=True)
    going, staying = active[order[:n]], active[order[n:]]
    free = ~torch.isin(candidates, staying)
    joining = candidates[free][score[free].argsort(descending=True, stable=True)[:n]]
    new = joining[~torch.isin(joining, going)]
    leaving = going[~torch.isin(going, joining)][: len(new)]
    return torch.cat([active[~torch.isin(active, leaving)], new]).sort().values
