"""The losses of steps, left on their device until somebody wants numbers: to read one is to wait for the step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from holdfast.errors import TrainingError

Parts = Mapping[str, torch.Tensor]  # of the loss of one micro-batch, by name: scalars


def numbers(micros: Sequence[Parts]) -> Counter[str]:
    """The parts of a step, summed over its micro-batches; waits for them."""
    return _summed(micros, iter(_read([v for parts in micros for v in parts.values()])))


def _summed(micros: Sequence[Parts], values: Iterator[float]) -> Counter[str]:
    total: Counter[str] = Counter()
    for parts in micros:
        total.update({name: next(values) for name in parts})
    return total


def _read(scalars: Sequence[torch.Tensor]) -> list[float]:
    """All in one copy; a float of any precision is the same as a double."""
    return torch.stack([s.double() for s in scalars]).tolist() if scalars else []


class Losses:
    """Parts of the loss by step, oldest first, until they are read."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Sequence[Parts]]] = []

    def add(self, step: int, micros: Sequence[Parts]) -> None:
        """step: 0-based, of the run."""
        self._kept.append((step, micros))

    def read(self, finite: bool = True) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, parts) of what was added since the last time.

        Raises:
            TrainingError: one is not `finite`; those before it were given.
        """
        kept, self._kept = self._kept, []
        values = iter(_read([v for _, micros in kept for parts in micros for v in parts.values()]))
        for step, micros in kept:
            total = _summed(micros, values)
            if finite:
                must_be_finite(step, total)
            yield step, dict(total)


def must_be_finite(step: int, parts: Mapping[str, float]) -> None:
    """Raise TrainingError, naming the step and the parts."""
    if not math.isfinite(sum(parts.values())):
        raise TrainingError(
            f"The loss is {sum(parts.values())} at step {step + 1} ("
            + ", ".join(f"{k} {v:.4g}" for k, v in parts.items())
            + "); the last good checkpoint is kept.",
            "Lower learning_rate (in a new output_dir), or look at the rows of this step.",
        )
