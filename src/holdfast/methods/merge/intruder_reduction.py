"""Intruder reduction: shrink the strong directions of a tuned matrix that no direction of the base resembles.

    W_0 = U0 S0 V0^T,  W = U S V^T;  m_j = max_i |<u_j, u0_i>| for the top_k largest s_j and ALL i
    intruders I: m_j < threshold_epsilon
    W <- W + (mitigation_lambda - 1) * sum over I of s_j u_j v_j^T

A mitigation_lambda of 1 changes nothing, 0 takes the intruders out. PEFT's `reduce_intruder_dimension` does this to an
adapter and cuts the outcome to its rank again; here it is done to the weights, in fp64, with nothing cut. Left vectors
are on the output side: GPT-2's transposed Conv1D is turned first. Embeddings, head, norms and experts in one tensor
stay as they are. Shrinking removes the base's share along u_j too.
`control` is no repair: it shrinks each whole change to the norm that the repair would leave. Notes of others found
that most of the effect comes from the norm, so look at both.
Cost: two eigenproblems of order min(m, n) for each matrix. Combine with: WiSEFT or LiNeS behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, layer_of
from holdfast.methods.merge._spectrum import left_vectors, shrunk
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class IntruderReduction(Method):
    """Reduction of intruder dimensions (Shuttleworth et al., NeurIPS 2025)."""

    mitigation_lambda: float = 0.75  # PEFT
    top_k: int = 10  # Sec. 3, PEFT
    threshold_epsilon: float = 0.5  # main text, PEFT
    control: bool = False  # ours

    paper: ClassVar = Paper("LoRA vs Full Fine-tuning: An Illusion of Equivalence", "2410.21228",
                            "the authors' code was not found; PEFT's was read")  # fmt: skip
    does: ClassVar = "shrinks strong directions afterwards that the base does not have"
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def off(self) -> bool:
        return self.mitigation_lambda == 1

    def check(self, ctx: Context) -> None:
        if not 0 <= self.mitigation_lambda <= 1:
            what = f"IntruderReduction.mitigation_lambda is {self.mitigation_lambda}."
            raise PlanError(what, "Use a number from 0 (without intruders) to 1 (as tuned).")
        if self.top_k < 1 or not 0 <= self.threshold_epsilon <= 1:
            raise PlanError(
                "IntruderReduction needs a top_k of at least 1 and a threshold_epsilon from 0 to 1.", "Mend them."
            )

    def prepare(self, ctx: Context) -> State:
        from transformers.pytorch_utils import Conv1D

        return {f"{n}.weight": torch.ones(()) for n, m in ctx.model.named_modules() if isinstance(m, Conv1D)}

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        base, tuned = weights["base"], weights["tuned"]
        if base.ndim != 2 or layer_of(name) is None or torch.equal(base, tuned):
            return tuned
        if name in state:
            return self._reduced(base.T, tuned.T).T
        return self._reduced(base, tuned)

    def _reduced(self, base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
        """The same of a matrix (outputs, inputs)."""
        u, _ = left_vectors(tuned, self.top_k)
        near = (u.T @ left_vectors(base)[0]).abs().amax(1)
        strangers = u[:, near < self.threshold_epsilon]
        w = tuned.double()
        new = w + (self.mitigation_lambda - 1) * strangers @ (strangers.T @ w)
        if self.control:
            return shrunk(base, tuned, torch.linalg.vector_norm(new - base))
        return new.to(tuned.dtype)
