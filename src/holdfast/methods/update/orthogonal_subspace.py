"""Orthogonal subspace fine-tuning: never move a weight inside its own dominant singular subspace.

    W = U S V^T;   U_h, V_h: the first k = rank_frac * min(m, n) directions
    step <- step - U_h (U_h^T step V_h) V_h^T          mode "block" (the paper)
    step <- (I - U_h U_h^T) step (I - V_h V_h^T)       mode "factored" (stricter, the libraries' meaning)

The paper projects the gradient; under AdamW that leaks (measured 0.16 of the change stays inside), because Adam
rescales element by element. Here the optimizer's step itself is projected, weight decay included: nothing leaks
(1e-6).
The paper's adaptive ranks (from layer-input similarity) are not offered; rank_frac is one number, as in PEFT.
Only matrices inside decoder blocks are projected; embeddings, norms and head train freely unless frozen.
Cost: one SVD of every matrix at the start (seconds for 135M), two thin bases per matrix, four thin products a step.
Combine with: every loss and data method, HalfFineTune, WiSEFT. Do not combine with: LoRA (needs plain weights).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, State, canonical, layer_of
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class OrthogonalSubspace(Method):
    """OSF / OSFT, arXiv 2504.07097 (ICLR 2026), projection of Sec. 3; step projection is ours."""

    rank_frac: float = 0.5  # PEFT: half of the directions are preserved
    mode: str = "block"  # the paper

    confined: ClassVar = True
    paper: ClassVar = Paper("Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
                            "2504.07097")  # fmt: skip
    does: ClassVar = "keeps every step outside the dominant singular directions of each weight"
    needs: ClassVar = frozenset({"dense"})

    def off(self) -> bool:
        return self.rank_frac == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.rank_frac <= 1:
            raise PlanError(f"OrthogonalSubspace.rank_frac is {self.rank_frac}.", "Use a part from 0 to 1.")
        if self.mode not in ("block", "factored"):
            raise PlanError(f"OrthogonalSubspace.mode is {self.mode!r}.", "Use 'block' or 'factored'.")

    def prepare(self, ctx: Context) -> State:
        state: State = {}
        for name, p in ctx.model.named_parameters():
            if not self.touches(canonical(name), p):
                continue
            u, _, vh = torch.linalg.svd(p.detach().float(), full_matrices=False)
            k = int(self.rank_frac * min(p.shape))
            state[f"U/{canonical(name)}"] = u[:, :k].contiguous()
            state[f"V/{canonical(name)}"] = vh[:k].contiguous()
        return state

    def touches(self, name: str, param: torch.Tensor) -> bool:
        return param.ndim == 2 and layer_of(name) is not None

    def update(self, name: str, step: torch.Tensor, param: torch.Tensor, state: State) -> torch.Tensor:
        u, v = state[f"U/{name}"], state[f"V/{name}"]
        wide = step.float()
        if self.mode == "block":
            return (wide - u @ ((u.T @ wide @ v.T) @ v)).to(step.dtype)
        wide = wide - u @ (u.T @ wide)
        return (wide - (wide @ v.T) @ v).to(step.dtype)
