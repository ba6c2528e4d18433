"""Early signs of a run: the mean norm of the gradient and the mean loss of the task in its first steps.

Of runs with different batches and rates those with the lower norm and the higher loss came out better when all weights
of models of 3B to 7B were tuned (arXiv 2412.13337). So the two are written down, to rank runs of one plan by; nothing
is chosen or stopped by them. The norm is that of what trains, after methods changed gradients and before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

STEPS = 100  # ours; of a shorter run all
ROWS, RATE = 128, 2e-5  # the smallest batch that the guide compares, and the rate that it found best


@dataclass
class Early:
    """The sum of the norms of the first steps, left on the device until it is read: to read is to wait."""

    steps: int = 0
    norms: torch.Tensor | float = 0.0

    def add(self, step: int, norm: torch.Tensor) -> None:
        """step: 0-based, of the run; norm: of its gradients."""
        if step < STEPS:
            self.steps, self.norms = self.steps + 1, self.norms + norm.detach()

    def saved(self) -> list[float]:
        """For a checkpoint: `Early(*saved)` goes on."""
        return [self.steps, float(self.norms)]

    def said(self, losses: Iterable[tuple[int, Any]]) -> dict[str, Any]:
        """As plain data; losses: (step, parts of the loss) of the run."""
        first = [parts["task"] for step, parts in losses if step < STEPS and "task" in parts]
        return {
            "steps": self.steps,
            "grad_norm": _mean(float(self.norms), self.steps),
            "loss": _mean(sum(first), len(first)),
        }


def _mean(total: float, count: int) -> float | None:
    return total / count if count and math.isfinite(total) else None


def norm_of(params: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, in fp32."""
    each = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(each)) if each else torch.zeros(())


def advice(rows: int, rate: float) -> list[str]:
    """What the guide would say to all weights trained at a rate with so many rows a step: [] or a sentence."""
    if rows >= ROWS or rate <= RATE:
        return []
    return [
        f"all weights train at a learning rate of {rate:g} with {rows} rows a step; for small models arXiv 2412.13337 "
        f"advises {ROWS} rows or more, or a rate of {RATE:g} or less"
    ]
