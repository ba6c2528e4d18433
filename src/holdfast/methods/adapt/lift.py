"""LIFT: train only the largest entries of each weight's low-rank part.

    W_R = sum_{i <= R} s_i u_i v_i^T;   k = min((m + n) * lora_rank, m n);   train the k entries of largest |W_R|

The entries are drawn anew every `interval` steps from the weights as they are then; an entry that stays keeps its
moments, one that joins starts without. All other entries are bit-identical to the base, weight decay included.
Embeddings, head, norms and biases do not train. R at full rank gives plain magnitude.
Differences from the paper: moments are kept dense here, so the memory is that of full tuning with zeros in it (the
paper's optimizer holds 2 k numbers); one step counter per tensor, as in the official code, so an entry that joins late
gets no bias correction of its own.
Cost: one truncated SVD of every matrix per drawing; gradients are dense. With `interval` the share that ever trained
grows beyond k.
Combine with: every loss and data method, HalfFineTune (intersection), WiSEFT. Do not combine with: LoRA.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.engine.ranks import largest
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, State
from holdfast.methods.adapt._matrices import is_matrix, only_matrices
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class LIFT(Method):
    """LIFT (ICML 2025), arXiv 2506.00772."""

    lora_rank: int = 128  # README of the paper's code: as many entries as a LoRA of this rank has numbers
    filter_rank: int = 128  # README: R
    interval: int = 0  # steps between drawings; 0 draws once. The paper's scripts: 10 to 2000

    confined: ClassVar = True
    paper: ClassVar = Paper("LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for "
                            "Reasoning-Focused Supervised Fine-Tuning", "2506.00772")  # fmt: skip
    does: ClassVar = "trains only the largest entries of each weight's low-rank part"
    needs: ClassVar = frozenset({"dense"})

    def off(self) -> bool:
        return self.lora_rank == 0

    def check(self, ctx: Context) -> None:
        if self.lora_rank < 0 or self.filter_rank < 1 or self.interval < 0:
            what = "LIFT needs lora_rank and interval of at least 0, and filter_rank of at least 1."
            raise PlanError(what, "Mend them.")

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        return only_matrices(model)

    def redraws(self, step: int) -> bool:
        return step == 0 or (self.interval > 0 and step % self.interval == 0)

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor | None:
        if not is_matrix(name, param):
            return None
        return principal(param, self.filter_rank, self.lora_rank)


def principal(weight: torch.Tensor, rank: int, lora_rank: int) -> torch.Tensor:
    """(m, n) bool: the min((m + n) * lora_rank, m n) largest entries of |W_R|, R = rank; ties go to the first."""
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return largest(low, sum(weight.shape) * lora_rank)
