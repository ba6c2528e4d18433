"""One mean, one difference, and the mean over tasks: values with two-sided intervals.

SE(mean) = sqrt(G/(G-1) * sum_g (sum_{i in g} (x_i - mean))^2) / N      (singletons: sd/sqrt(N))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from holdfast.errors import HoldfastError
from holdfast.measure.stats.given import Task, alpha_of, chance_of, groups_of, is_binary, numbers_of, pair_of
from holdfast.measure.stats.records import Estimate

_LEAST = 1e-9  # a standard error below it is a rounding error of none


def standard_error(x: np.ndarray, group: np.ndarray, g: int) -> float:
    """Return the cluster-robust standard error of mean(x); inf if there is one cluster and so no spread."""
    if np.ptp(x) == 0 and x.size > 1 and g > 1:
        return 0.0  # exact, where x - mean may leave a rounding error
    if g < 2:
        return math.inf
    sums = np.bincount(group, weights=x - x.mean(), minlength=g)
    return float(np.sqrt(g / (g - 1) * (sums**2).sum()) / x.size)


def t_interval(x: np.ndarray, group: np.ndarray, g: int, level: float) -> Estimate:
    value, se = (float(x[0]) if np.ptp(x) == 0 else float(x.mean())), standard_error(x, group, g)
    half = se * float(stdtrit(g - 1, 1 - alpha_of(level) / 2)) if 0 < se < math.inf else se
    return Estimate(value, value - half, value + half, x.size)


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)


def _unit(x: np.ndarray) -> np.ndarray:
    """Scores between 0 and 1, what rounding has added cut off."""
    wrong = np.flatnonzero((x < -1e-9) | (x > 1 + 1e-9))
    if wrong.size:
        at = int(wrong[0])
        raise HoldfastError(f"The score of item {at} is {x[at]:g}.", "Give scores between 0 and 1.")
    return np.clip(x, 0.0, 1.0)


def _moved(base: ArrayLike, tuned: ArrayLike) -> np.ndarray:
    """(1 + tuned - base) / 2 of scores between 0 and 1 (N,): between 0 and 1, and 0.5 where nothing changed."""
    b, t = pair_of(base, tuned)
    return (1 + _unit(t) - _unit(b)) / 2


def _doubled(half: Estimate) -> Estimate:
    """The change that a mean of `_moved` stands for."""
    return Estimate(2 * half.value - 1, 2 * half.low - 1, 2 * half.high - 1, half.n)


def _around(value: float, n: float, z: float, num_items: int) -> Estimate:
    """Wilson's interval; the value itself may round to one bit beyond an end."""
    low, high = wilson(value, n, z)
    return Estimate(value, max(0.0, min(low, value)), min(1.0, max(high, value)), num_items)


def _share(x: np.ndarray, group: np.ndarray, g: int, level: float) -> Estimate:
    """`share` of checked scores."""
    value, se = (float(x[0]) if np.ptp(x) == 0 else float(x.mean())), standard_error(x, group, g)
    tail = 1 - alpha_of(level) / 2
    seen = _LEAST < se < math.inf and not (is_binary(x) and g == x.size)
    n, z = (value * (1 - value) / se**2, stdtrit(g - 1, tail)) if seen else (g, ndtri(tail))
    n = (
        min(n, x.size) if is_binary(x) else n
    )  # clusters make 0/1 scores less sure than as many single ones, never more
    return _around(value, n, float(z), x.size)


def _average(parts: Sequence[tuple[np.ndarray, np.ndarray, int]], level: float) -> Estimate:
    """`average` of checked scores: (scores, cluster of each, number of clusters) of every task."""
    if not parts:
        raise HoldfastError("There is no task to average over.", "Give at least one task.")
    if len(parts) == 1:
        return _share(*parts[0], level)
    k, items, tail = len(parts), sum(x.size for x, _, _ in parts), 1 - alpha_of(level) / 2
    value, square = (math.fsum(float((x**power).mean()) for x, _, _ in parts) / k for power in (1, 2))
    variances = [_variance(*part, value, square) for part in parts]
    total = math.fsum(variances)
    if total <= _LEAST**2 or not 0 < value < 1:  # all items of all tasks alike
        return _around(value, k * k / math.fsum(1 / g for _, _, g in parts), float(ndtri(tail)), items)
    dof = total**2 / math.fsum(v * v / max(g - 1, 1) for v, (_, _, g) in zip(variances, parts, strict=True))
    return _around(value, value * (1 - value) / (total / (k * k)), float(stdtrit(dof, tail)), items)


def _variance(x: np.ndarray, group: np.ndarray, g: int, value: float, square: float) -> float:
    """SE^2 of a task; without spread that of its G clusters and one item more, of the mean and mean square given."""
    se = standard_error(x, group, g)
    if _LEAST < se < math.inf:
        return se**2
    mine = float(x.mean())
    centre = (g * mine + value) / (g + 1)
    return max(0.0, (g * float((x**2).mean()) + square) / (g + 1) - centre**2) / g


def mean(x: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of numbers (N,) with a two-sided interval; `share` is for scores between 0 and 1.

    The t interval with G-1 degrees of freedom; 0/1 scores go to `share`. One number: (-inf, inf). Constants: no width.
    """
    x = numbers_of(x, "x")
    group, g = groups_of(clusters, x.size)
    return _share(x, group, g, level) if is_binary(x) else t_interval(x, group, g, level)


def share(x: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of scores between 0 and 1 (N,), with a two-sided interval that stays between 0 and 1.

    0/1 scores without clusters: Wilson. Graded or clustered scores: Wilson with the t quantile of G-1 degrees of
    freedom and the effective number of items p(1-p)/SE^2, the number of 0/1 scores that would be as sure (at most N if
    they are 0/1). Where no spread is seen (all alike, or a single cluster) that number is G: a few equal scores do not
    prove that all are.

    Raises:
        HoldfastError: a score lies outside 0 to 1.
    """
    x = _unit(numbers_of(x, "x"))
    return _share(x, *groups_of(clusters, x.size), level)


def change(base: ArrayLike, tuned: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of tuned - base over the same items (N,), with an interval that stays between -1 and 1.

    The interval of `share` for (1 + tuned - base) / 2. [0, 0] if all are equal: nothing changed on these items.

    Raises:
        HoldfastError: a score lies outside 0 to 1, or the lengths differ.
    """
    y = _moved(base, tuned)
    if (y == 0.5).all():
        return Estimate(0.0, 0.0, 0.0, y.size)
    return _doubled(_share(y, *groups_of(clusters, y.size), level))


def average(tasks: Sequence[tuple[ArrayLike, ArrayLike | None]], level: float = 0.95) -> Estimate:
    """Return the mean over tasks (scores between 0 and 1, clusters or None) of their means, as `share` does for one.

    SE^2 is the sum of the tasks' SE^2 over the square of their number, and the degrees of freedom are Satterthwaite's.
    A task that shows no spread, such as one without a single error, gets that of one more item drawn from all tasks.
    """
    return _average([(_unit(numbers_of(x, "x")), *groups_of(c, np.size(x))) for x, c in tasks], level)


def average_change(tasks: Sequence[Task], level: float = 0.95) -> Estimate:
    """Return the mean over tasks of the mean of tuned - base, as `change` does for one task."""
    moved = [(_moved(b, t), *groups_of(c, np.size(b))) for b, t, c in tasks]
    if all((y == 0.5).all() for y, _, _ in moved):
        return Estimate(0.0, 0.0, 0.0, sum(y.size for y, _, _ in moved))
    return _doubled(_average(moved, level))


def paired(base: ArrayLike, tuned: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of tuned - base over the same items (N,) with its t interval; [0, 0] if all are equal.

    Raises HoldfastError if the lengths differ.
    """
    b, t = pair_of(base, tuned)
    d = t - b
    group, g = groups_of(clusters, d.size)
    return t_interval(d, group, g, level) if d.any() else Estimate(0.0, 0.0, 0.0, d.size)


def pooled(total: ArrayLike, size: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return sum(total) / sum(size) over items (N,), such as the loss per token of rows, with its t interval.

    The ratio's error is that of the mean of total - ratio * size over mean(size) (linearised; Cochran 1977, ch. 6).
    Totals that are differences of two models on the same items give the paired interval; [0, 0] if all are 0.

    Raises:
        HoldfastError: the lengths differ, or the sizes are not all positive.
    """
    t, s = pair_of(total, size)
    if (s <= 0).any():
        raise HoldfastError("An item has a size of 0 or less.", "Leave it out.")
    if not t.any():
        return Estimate(0.0, 0.0, 0.0, t.size)
    ratio = float(t.sum() / s.sum())
    group, g = groups_of(clusters, t.size)
    spread = t_interval((t - ratio * s) / s.mean(), group, g, level)
    return Estimate(ratio, ratio + spread.low - spread.value, ratio + spread.high - spread.value, t.size)


def normalise(score: Any, chance: float) -> Any:
    """Return (score - chance) / (1 - chance): 0 for a guesser, 1 for a perfect score. Numbers or arrays."""
    return (score - chance_of(chance, "score")) / (1 - chance)


def measurable(base: ArrayLike, clusters: ArrayLike | None = None, chance: float = 0.0) -> bool:
    """Return whether the mean of base (N,) is at least 2 SE above chance: else no loss could be seen.

    For 0/1 scores the Wilson bound (z = 2) must be above chance too: all right out of three has SE 0 but
    proves little. Its sample size is p(1-p)/SE^2, kept between G and N.
    """
    x, c = numbers_of(base, "base"), chance_of(chance, "base")
    group, g = groups_of(clusters, x.size)
    p, se = float(x.mean()), standard_error(x, group, g)
    if is_binary(x):
        size = min(max(p * (1 - p) / se**2 if se > 0 else 0.0, g), x.size)
        if wilson(p, size, 2.0)[0] <= c:
            return False
        se = 0.0 if math.isinf(se) else se  # one cluster: Wilson has spoken
    return p > c and p - c >= 2 * se


def seeds(values_per_seed: ArrayLike, level: float = 0.95) -> Estimate:
    """Return the mean over training seeds (S,) with its t interval: the spread from run to run."""
    x = numbers_of(values_per_seed, "values_per_seed")
    return t_interval(x, np.arange(x.size), x.size, level)
