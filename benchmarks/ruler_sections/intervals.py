"""How often intervals of few items cover the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ruler_sections.lab import Data, Lab

CLUSTERS = (5, 10, 30)
TRUTHS = (0.02, 0.1, 0.5, 0.9, 0.98)


def _spread_out(p: float, g: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(g,) draws from a beta with mean p: strength 1 lies at 0 and 1 mostly, 20 near p."""
    return rng.beta(strength * p, strength * (1 - p), g)


def _shared(p: float, g: int, rng: np.random.Generator) -> np.ndarray:
    """(g, 4) 0/1 scores; the four of a cluster are correlated by 0.3."""
    return (rng.random((g, 4)) < _spread_out(p, g, 0.7 / 0.3, rng)[:, None]).astype(float)


KINDS: dict[str, Callable[[float, int, np.random.Generator], np.ndarray]] = {  # -> (clusters, items in each)
    "0/1": lambda p, g, rng: (rng.random((g, 1)) < p).astype(float),
    "0/1, four in a cluster": _shared,
    "0, 1/2, 1": lambda p, g, rng: rng.binomial(2, p, (g, 1)) / 2,
    "0, 1/2, 1, three in a cluster": lambda p, g, rng: rng.binomial(2, p, (g, 3)) / 2,
    "graded, close together": lambda p, g, rng: _spread_out(p, g, 20, rng)[:, None],
    "graded, nearly all at 0 or 1": lambda p, g, rng: _spread_out(p, g, 1, rng)[:, None],
}


def intervals(lab: Lab) -> Data:
    """How often the printed 95 % intervals hold the truth, where items are few and scores near their bounds."""
    reps, rng = lab.size(4000, 20), np.random.default_rng(0)
    return {
        "repetitions": reps,
        "one": [_coverage(kind, g, reps, rng) for kind in KINDS for g in CLUSTERS],
        "five": [_coverage(kind, g, reps // 5, rng, tasks=5) for kind in list(KINDS)[:3] for g in CLUSTERS],
        "changes": [_coverage_of_change(g, loss, reps, rng) for g in CLUSTERS for loss in (0.02, 0.1, 0.5, 0.9)],
    }


def _coverage(kind: str, g: int, reps: int, rng: np.random.Generator, tasks: int = 1) -> Data:
    """Coverage and mean width at each true score, of one task or the mean of several equal ones."""
    from holdfast.measure import stats

    hits, widths = [], []
    for p in TRUTHS:
        drawn = [stats.average([_scores(KINDS[kind](p, g, rng)) for _ in range(tasks)]) for _ in range(reps)]
        assert all(0 <= e.low <= e.value <= e.high <= 1 for e in drawn)
        hits.append(float(np.mean([e.low <= p <= e.high for e in drawn])))
        widths.append(float(np.mean([e.high - e.low for e in drawn])))
    return {"kind": kind, "clusters": g, "tasks": tasks, "covered": hits, "width": widths}


def _scores(drawn: np.ndarray) -> Any:
    """Scores and clusters as `stats` takes them."""
    g, m = drawn.shape
    return drawn.ravel(), np.repeat(np.arange(g), m) if m > 1 else None


def _coverage_of_change(n: int, loss: float, reps: int, rng: np.random.Generator) -> Data:
    """Coverage of a paired difference of 0/1 scores where `loss` of the right answers get lost and none are won."""
    from holdfast.measure import stats

    hits = 0
    for _ in range(reps):
        e = stats.change(np.ones(n), (rng.random(n) >= loss).astype(float))
        assert -1 <= e.low <= e.value <= e.high <= 1
        hits += e.low <= -loss <= e.high or e.value == 0  # no change seen has no interval to be wrong
    return {"items": n, "loss": loss, "covered": hits / reps}
