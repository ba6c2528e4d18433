"""Whether a model is as sure as it is right."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from holdfast.errors import HoldfastError
from holdfast.measure.stats.given import is_binary, numbers_of


def _probabilities(prob: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    p, y = numbers_of(prob, "prob"), numbers_of(correct, "correct")
    if p.size != y.size or p.min() < 0 or p.max() > 1 or not is_binary(y):
        raise HoldfastError(
            f"{p.size} probabilities in [{p.min():.3g}, {p.max():.3g}] do not fit {y.size} marks.",
            "Give one probability in [0, 1] and one mark, 0 or 1, per item.",
        )
    return p, y


def ece(prob: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error: |accuracy - confidence| averaged over items in equal-width bins.

    prob (N,): confidence in the given answer. correct (N,): 0/1. A value on an edge belongs to the lower bin.
    """
    p, y = _probabilities(prob, correct)
    index = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(index, weights=y - p, minlength=bins)).sum() / p.size)


def brier(prob: ArrayLike, correct: ArrayLike) -> float:
    """Return the mean of (prob - correct)^2: 0 is perfect, 0.25 is a fair coin."""
    p, y = _probabilities(prob, correct)
    return float(((p - y) ** 2).mean())
