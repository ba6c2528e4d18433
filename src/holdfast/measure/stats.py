"""Intervals, paired tests and verdicts for small evaluations.

Legend: N items, G clusters (items that share a passage or template), d_i = tuned_i - base_i on the same item.

    SE(mean) = sqrt(G/(G-1) * sum_g (sum_{i in g} (x_i - mean))^2) / N      (singletons: sd/sqrt(N))

Sources: Miller 2024 (arXiv 2411.00640) for clustered and paired errors; Wilson 1927; Kish 1965 and Dean & Pagano 2015
(Wilson with the effective number of items); Satterthwaite 1946; McNemar 1947; Tango 1998 (score interval of a paired
difference of proportions); Holm 1979; Berger 1982 (intersection-union tests).

Scores are numbers where higher is better; accuracies are 0/1. Every bootstrap function is deterministic in
`seed`, and sorts its items by value first, so the order of items never matters. Each task draws from its own
stream, keyed by its name, so the order of tasks, or adding one, does not change the others.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import bdtr, bdtri, ndtr, ndtri, stdtr, stdtrit

from holdfast.errors import HoldfastError

Task = tuple[ArrayLike, ArrayLike, "ArrayLike | None"]  # base scores (N,), tuned scores (N,), clusters (N,) or None
_LEAST = 1e-9  # a standard error below it is a rounding error of none
_FEW_VALUES = 32  # up to here multinomial counts of distinct rows are faster than drawing indices


class _Record:
    """to_dict and from_dict that survive strict JSON: what is not finite becomes None and comes back."""

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]):
        missing = {"low": -math.inf, "lower": -math.inf, "high": math.inf, "upper": math.inf}
        full: dict[str, Any] = {k: missing.get(k, math.nan) if v is None else v for k, v in data.items()}
        if isinstance(full.get("estimate"), Mapping):
            full["estimate"] = Estimate.from_dict(full["estimate"])
        return cls(**full)


def _plain(value: Any) -> Any:
    if isinstance(value, _Record):
        return value.to_dict()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Estimate(_Record):
    """A value, its two-sided interval and the number of items. Spread unknown: low -inf, high inf."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Ratio(_Record):
    """A retention ratio (1 = nothing lost). If not `defined`, the numbers are nan: report a difference."""

    value: float
    low: float
    high: float
    defined: bool


@dataclass(frozen=True)
class Verdict(_Record):
    """What is known about one loss, in the units of the score.

    status: 'kept', 'lost' or 'unclear'. p: one-sided p of H0 'difference <= -margin' (small = kept).
    p_loss: one-sided p of H0 'difference >= 0' (small = a real loss). estimate: two-sided interval of the
    difference. lower, upper: the one-sided bounds, each at the level of the test, that decided the status.
    """

    status: str
    p: float
    estimate: Estimate
    margin: float
    lower: float
    upper: float
    p_loss: float


# ---------------------------------------------------------------- reading the input


def _numbers(x: ArrayLike, name: str) -> np.ndarray:
    out = np.asarray(x, dtype=float)
    if out.ndim != 1 or out.size == 0:
        raise HoldfastError(
            f"{name} has shape {out.shape}, not a list of at least one number.", "Give one score per item."
        )
    if not np.isfinite(out).all():
        at = int(np.flatnonzero(~np.isfinite(out))[0])
        raise HoldfastError(f"{name} has the value {out[at]} at item {at}.", "Remove the item or mend its score.")
    return out


def _pair(base: ArrayLike, tuned: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    b, t = _numbers(base, "base"), _numbers(tuned, "tuned")
    if b.size != t.size:
        raise HoldfastError(
            f"base has {b.size} scores and tuned has {t.size}.",
            "Score both models on the same items, in one order.",
        )
    return b, t


def _groups(clusters: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
    """Return the cluster number of each item (N,) and G."""
    if clusters is None:
        return np.arange(n), n
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if index.size != n:
        raise HoldfastError(f"There are {index.size} cluster names for {n} scores.", "Give one cluster per item.")
    return index.reshape(-1), names.size


def _binary(*arrays: np.ndarray) -> bool:
    return all(bool(np.isin(a, (0.0, 1.0)).all()) for a in arrays)


def _alpha(level: float) -> float:
    if not 0 < level < 1:
        raise HoldfastError(f"The level is {level}.", "Give a level between 0 and 1, such as 0.95.")
    return 1 - level


def _chance(chance: Mapping[str, float] | float, name: str) -> float:
    if isinstance(chance, Mapping) and name not in chance:
        raise HoldfastError(f"Task {name!r} has no chance level.", f"Add {name!r} to the chance levels (0 if open).")
    c = float(chance[name] if isinstance(chance, Mapping) else chance)
    if not 0 <= c < 1:
        raise HoldfastError(f"The chance level of {name!r} is {c}.", "Give 1/choices or the majority rate, below 1.")
    return c


# ---------------------------------------------------------------- one mean, one difference


def _error(x: np.ndarray, group: np.ndarray, g: int) -> float:
    """Return the cluster-robust standard error of mean(x); inf if there is one cluster and so no spread."""
    if np.ptp(x) == 0 and x.size > 1 and g > 1:
        return 0.0  # exact, where x - mean may leave a rounding error
    if g < 2:
        return math.inf
    sums = np.bincount(group, weights=x - x.mean(), minlength=g)
    return float(np.sqrt(g / (g - 1) * (sums**2).sum()) / x.size)


def _interval(x: np.ndarray, group: np.ndarray, g: int, level: float) -> Estimate:
    value, se = (float(x[0]) if np.ptp(x) == 0 else float(x.mean())), _error(x, group, g)
    half = se * float(stdtrit(g - 1, 1 - _alpha(level) / 2)) if 0 < se < math.inf else se
    return Estimate(value, value - half, value + half, x.size)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
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
    b, t = _pair(base, tuned)
    return (1 + _unit(t) - _unit(b)) / 2


def _doubled(half: Estimate) -> Estimate:
    """The change that a mean of `_moved` stands for."""
    return Estimate(2 * half.value - 1, 2 * half.low - 1, 2 * half.high - 1, half.n)


def _around(value: float, n: float, z: float, num_items: int) -> Estimate:
    """Wilson's interval; the value itself may round to one bit beyond an end."""
    low, high = _wilson(value, n, z)
    return Estimate(value, max(0.0, min(low, value)), min(1.0, max(high, value)), num_items)


def _share(x: np.ndarray, group: np.ndarray, g: int, level: float) -> Estimate:
    """`share` of checked scores."""
    value, se = (float(x[0]) if np.ptp(x) == 0 else float(x.mean())), _error(x, group, g)
    tail = 1 - _alpha(level) / 2
    seen = _LEAST < se < math.inf and not (_binary(x) and g == x.size)
    n, z = (value * (1 - value) / se**2, stdtrit(g - 1, tail)) if seen else (g, ndtri(tail))
    n = min(n, x.size) if _binary(x) else n  # clusters make 0/1 scores less sure than as many single ones, never more
    return _around(value, n, float(z), x.size)


def _average(parts: Sequence[tuple[np.ndarray, np.ndarray, int]], level: float) -> Estimate:
    """`average` of checked scores: (scores, cluster of each, number of clusters) of every task."""
    if not parts:
        raise HoldfastError("There is no task to average over.", "Give at least one task.")
    if len(parts) == 1:
        return _share(*parts[0], level)
    k, items, tail = len(parts), sum(x.size for x, _, _ in parts), 1 - _alpha(level) / 2
    value, square = (math.fsum(float((x**power).mean()) for x, _, _ in parts) / k for power in (1, 2))
    variances = [_variance(*part, value, square) for part in parts]
    total = math.fsum(variances)
    if total <= _LEAST**2 or not 0 < value < 1:  # all items of all tasks alike
        return _around(value, k * k / math.fsum(1 / g for _, _, g in parts), float(ndtri(tail)), items)
    dof = total**2 / math.fsum(v * v / max(g - 1, 1) for v, (_, _, g) in zip(variances, parts, strict=True))
    return _around(value, value * (1 - value) / (total / (k * k)), float(stdtrit(dof, tail)), items)


def _variance(x: np.ndarray, group: np.ndarray, g: int, value: float, square: float) -> float:
    """SE^2 of a task; without spread that of its G clusters and one item more, of the mean and mean square given."""
    se = _error(x, group, g)
    if _LEAST < se < math.inf:
        return se**2
    mine = float(x.mean())
    centre = (g * mine + value) / (g + 1)
    return max(0.0, (g * float((x**2).mean()) + square) / (g + 1) - centre**2) / g


def mean(x: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of numbers (N,) with a two-sided interval; `share` is for scores between 0 and 1.

    The t interval with G-1 degrees of freedom; 0/1 scores go to `share`. One number: (-inf, inf). Constants: no width.
    """
    x = _numbers(x, "x")
    group, g = _groups(clusters, x.size)
    return _share(x, group, g, level) if _binary(x) else _interval(x, group, g, level)


def share(x: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of scores between 0 and 1 (N,), with a two-sided interval that stays between 0 and 1.

    0/1 scores without clusters: Wilson. Graded or clustered scores: Wilson with the t quantile of G-1 degrees of
    freedom and the effective number of items p(1-p)/SE^2, the number of 0/1 scores that would be as sure (at most N if
    they are 0/1). Where no spread is seen (all alike, or a single cluster) that number is G: a few equal scores do not
    prove that all are.

    Raises:
        HoldfastError: a score lies outside 0 to 1.
    """
    x = _unit(_numbers(x, "x"))
    return _share(x, *_groups(clusters, x.size), level)


def change(base: ArrayLike, tuned: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of tuned - base over the same items (N,), with an interval that stays between -1 and 1.

    The interval of `share` for (1 + tuned - base) / 2. [0, 0] if all are equal: nothing changed on these items.

    Raises:
        HoldfastError: a score lies outside 0 to 1, or the lengths differ.
    """
    y = _moved(base, tuned)
    if (y == 0.5).all():
        return Estimate(0.0, 0.0, 0.0, y.size)
    return _doubled(_share(y, *_groups(clusters, y.size), level))


def average(tasks: Sequence[tuple[ArrayLike, ArrayLike | None]], level: float = 0.95) -> Estimate:
    """Return the mean over tasks (scores between 0 and 1, clusters or None) of their means, as `share` does for one.

    SE^2 is the sum of the tasks' SE^2 over the square of their number, and the degrees of freedom are Satterthwaite's.
    A task that shows no spread, such as one without a single error, gets that of one more item drawn from all tasks.
    """
    return _average([(_unit(_numbers(x, "x")), *_groups(c, np.size(x))) for x, c in tasks], level)


def average_change(tasks: Sequence[Task], level: float = 0.95) -> Estimate:
    """Return the mean over tasks of the mean of tuned - base, as `change` does for one task."""
    moved = [(_moved(b, t), *_groups(c, np.size(b))) for b, t, c in tasks]
    if all((y == 0.5).all() for y, _, _ in moved):
        return Estimate(0.0, 0.0, 0.0, sum(y.size for y, _, _ in moved))
    return _doubled(_average(moved, level))


def paired(base: ArrayLike, tuned: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """Return the mean of tuned - base over the same items (N,) with its t interval; [0, 0] if all are equal.

    Raises HoldfastError if the lengths differ.
    """
    b, t = _pair(base, tuned)
    d = t - b
    group, g = _groups(clusters, d.size)
    return _interval(d, group, g, level) if d.any() else Estimate(0.0, 0.0, 0.0, d.size)


def mcnemar(base: ArrayLike, tuned: ArrayLike) -> float:
    """Return the exact two-sided p of 'gains and losses are equally likely' for 0/1 scores (N,)."""
    b, t = _pair(base, tuned)
    if not _binary(b, t):
        raise HoldfastError("McNemar's test got scores other than 0 and 1.", "Use paired() for graded scores.")
    gains, losses = int((t > b).sum()), int((t < b).sum())
    return min(1.0, 2 * float(bdtr(min(gains, losses), gains + losses, 0.5)))


def normalise(score: Any, chance: float) -> Any:
    """Return (score - chance) / (1 - chance): 0 for a guesser, 1 for a perfect score. Numbers or arrays."""
    return (score - _chance(chance, "score")) / (1 - chance)


def measurable(base: ArrayLike, clusters: ArrayLike | None = None, chance: float = 0.0) -> bool:
    """Return whether the mean of base (N,) is at least 2 SE above chance: else no loss could be seen.

    For 0/1 scores the Wilson bound (z = 2) must be above chance too: all right out of three has SE 0 but
    proves little. Its sample size is p(1-p)/SE^2, kept between G and N.
    """
    x, c = _numbers(base, "base"), _chance(chance, "base")
    group, g = _groups(clusters, x.size)
    p, se = float(x.mean()), _error(x, group, g)
    if _binary(x):
        size = min(max(p * (1 - p) / se**2 if se > 0 else 0.0, g), x.size)
        if _wilson(p, size, 2.0)[0] <= c:
            return False
        se = 0.0 if math.isinf(se) else se  # one cluster: Wilson has spoken
    return p > c and p - c >= 2 * se


# ---------------------------------------------------------------- bootstrap over many tasks


def _resample(rows: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return column sums (draws, C) of rows (G, C) drawn with replacement G at a time."""
    distinct, counts = np.unique(rows, axis=0, return_counts=True)  # sorted: the order of items cannot matter
    if len(distinct) <= _FEW_VALUES:
        return rng.multinomial(len(rows), counts / len(rows), size=draws) @ distinct
    rows, g = np.repeat(distinct, counts, axis=0), len(rows)
    out = np.empty((draws, rows.shape[1]))
    step = max(1, 100_000 // g)  # keeps the index table in the cache
    for i in range(0, draws, step):
        k = min(step, draws - i)
        pick = rng.integers(0, g, (k, g)) + np.arange(k)[:, None] * g
        out[i : i + k] = np.bincount(pick.ravel(), minlength=k * g).reshape(k, g).astype(float) @ rows
    return out


def _task_draws(task: Task, draws: int, rng: np.random.Generator) -> tuple[float, float, np.ndarray, np.ndarray, int]:
    """Return mean base, mean difference, draws (draws,) of both from the same resampled clusters, and N.

    Deviations are widened by sqrt(G/(G-1)), the factor a plain bootstrap lacks. With one cluster there is no
    spread to resample: the difference is drawn 1.0 to either side, the widest for scores in [0, 1].
    """
    b, t = _pair(task[0], task[1])
    d = t - b
    group, g = _groups(task[2], b.size)
    at = float(b.mean()), (float(d.mean()) if d.any() else 0.0)
    if g == 1:
        sign = rng.choice((-1.0, 1.0), draws)
        return *at, at[0] + sign / 2, at[1] - sign * bool(d.any()), b.size
    rows = np.stack([np.bincount(group, weights=w, minlength=g) for w in (b, d, np.ones_like(b))], axis=1)
    sums, widen = _resample(rows, draws, rng), math.sqrt(g / (g - 1))
    drawn = [m + (sums[:, i] / sums[:, 2] - m) * widen for i, m in enumerate(at)]
    return *at, drawn[0], drawn[1], b.size


def macro_draws(
    tasks: Mapping[str, Task], chance: Mapping[str, float], draws: int = 4000, seed: int = 0
) -> tuple[tuple[float, float], np.ndarray, np.ndarray, int]:
    """Return ((base, difference), draws of base, draws of difference, N): macro means, normalised for chance.

    The two arrays (draws,) come from the same resampled clusters within each task.
    """
    if not tasks:
        raise HoldfastError("There is no task to average over.", "Give at least one task.")
    base = difference = 0.0
    base_draws, difference_draws, n = np.zeros(draws), np.zeros(draws), 0
    for name in sorted(tasks):
        c = _chance(chance, name)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        b, d, bs, ds, size = _task_draws(tasks[name], draws, rng)
        base, difference = base + (b - c) / (1 - c), difference + d / (1 - c)
        base_draws += (bs - c) / (1 - c)
        difference_draws += ds / (1 - c)
        n += size
    k = len(tasks)
    return (base / k, difference / k), base_draws / k, difference_draws / k, n


def _ends(x: np.ndarray, level: float) -> tuple[float, float]:
    half = _alpha(level) / 2
    low, high = np.quantile(x, [half, 1 - half])
    return float(low), float(high)


def macro_difference(
    tasks: Mapping[str, Task],
    chance: Mapping[str, float],
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Estimate:
    """Return the primary endpoint: the mean over tasks of (tuned - base) / (1 - chance).

    The percentile interval resamples clusters within tasks; the tasks themselves are fixed, so it speaks of
    these tasks, not of tasks in general. Cost: about 0.1 s for 24 tasks of 100 items.
    """
    (_, value), _, drawn, n = macro_draws(tasks, chance, draws, seed)
    return Estimate(value, *_ends(drawn, level), n)


def retention(
    tasks: Mapping[str, Task],
    chance: Mapping[str, float],
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Ratio:
    """Return the macro chance-normalised mean of tuned over that of base, with a paired bootstrap interval.

    Not defined if base is less than 2 bootstrap SE above chance; draws with base at or below chance (then at
    most a few in a hundred) are left out of the interval. A tuned model below chance has a negative ratio.
    """
    (base, difference), bs, ds, _ = macro_draws(tasks, chance, draws, seed)
    if base <= 1e-12 or base < 2 * float(bs.std()):
        return Ratio(math.nan, math.nan, math.nan, False)
    good = bs > 0
    return Ratio(1 + difference / base, *_ends(1 + ds[good] / bs[good], level), True)


def seeds(values_per_seed: ArrayLike, level: float = 0.95) -> Estimate:
    """Return the mean over training seeds (S,) with its t interval: the spread from run to run."""
    x = _numbers(values_per_seed, "values_per_seed")
    return _interval(x, np.arange(x.size), x.size, level)


def hierarchical(
    runs: Sequence[tuple[ArrayLike, ArrayLike]], level: float = 0.95, draws: int = 4000, seed: int = 0
) -> Estimate:
    """Return the mean difference over runs (S) and items (N), resampling seeds, then items.

    All runs must have scored the same N items, in one order: each draw uses one set of items for all its
    runs, as hard items are hard in every run. Deviations are widened by sqrt(S/(S-1)); with fewer than five
    runs the interval is still too narrow for a claim about seeds, so give seeds() beside it.
    Raises HoldfastError if there is no run or the runs differ in length.
    """
    pairs = [_pair(b, t) for b, t in runs]
    if len({b.size for b, _ in pairs}) != 1:
        raise HoldfastError(
            f"The {len(pairs)} runs have {[b.size for b, _ in pairs]} items.",
            "Give runs over the same items.",
        )
    d = np.stack([t - b for b, t in pairs])  # (S, N)
    if not d.any():
        return Estimate(0.0, 0.0, 0.0, d.size)
    (s, n), rng = d.shape, np.random.default_rng(seed)
    picks = rng.multinomial(s, np.full(s, 1 / s), size=draws) / s  # (draws, S)
    d = d[:, np.lexsort(d)]  # the order of items cannot matter
    step, drawn = max(1, 2_000_000 // n), []
    for i in range(0, draws, step):
        items = rng.integers(0, n, (min(step, draws - i), n), dtype=np.int32)
        drawn.append(sum(picks[i : i + step, r] * d[r].take(items).mean(axis=1) for r in range(s)))
    value, widen = float(d.mean()), math.sqrt(s / (s - 1)) if s > 1 else math.sqrt(n / max(n - 1, 1))
    return Estimate(value, *_ends(value + (np.concatenate(drawn) - value) * widen, level), d.size)


# ---------------------------------------------------------------- verdicts


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p values under the same names; never below the raw ones, in the same order."""
    out, running = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: (item[1], item[0]))):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        out[name] = running
    return {name: out[name] for name in p_values}


def _tango(gains: float, losses: float, n: float, diff: float) -> float:
    """Return Tango's score statistic (standard normal) of H0 'P(gain) - P(loss) = diff'."""
    b = -gains - losses + (2 * n - gains + losses) * diff
    c = -losses * diff * (1 - diff)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # P(loss) at its likeliest under H0
    top, variance = gains - losses - n * diff, n * (2 * q + diff * (1 - diff))
    return 0.0 if top == 0 else top / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, top)


def _crossing(f: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of the falling f; the end it would lie beyond if there is none between low and high."""
    if f(low) <= 0:
        return low
    if f(high) >= 0:
        return high
    root: Any = brentq(f, low, high, xtol=1e-9)
    return float(root)


def _score_test(
    gains: float, losses: float, n: float, margin: float, alpha: float
) -> tuple[float, float, float, float]:
    """Return p, p_loss, lower, upper for 0/1 pairs; p_loss is the exact sign test, safe with few pairs."""
    z, d = float(ndtri(1 - alpha)), (gains - losses) / n
    p = float(ndtr(-_tango(gains, losses, n, -min(margin, 1.0))))
    p_loss = float(bdtr(round(gains), round(gains) + round(losses), 0.5))
    lower = _crossing(lambda x: _tango(gains, losses, n, x) - z, -1.0, d)
    if gains == 0:  # only losses: a plain proportion, whose exact bound is the rule of three
        p = max(p, float(bdtr(round(losses), n, min(margin, 1.0))))
        lower = min(lower, -float(bdtri(round(losses), n, alpha)) if losses < n else -1.0)
    upper = _crossing(lambda x: _tango(gains, losses, n, x) + z, d, 1.0)
    return p, p_loss, lower, upper if p_loss < alpha else max(upper, 0.0)


def _t_test(value: float, se: float, dof: int, margin: float, alpha: float) -> tuple[float, float, float, float]:
    """Return p, p_loss, lower, upper for graded scores or clusters."""
    if math.isinf(se):
        return 1.0, 1.0, -math.inf, math.inf
    if se == 0:
        return float(value <= -margin), float(value >= 0), value, value
    half = se * float(stdtrit(dof, 1 - alpha))
    return (
        float(stdtr(dof, -(value + margin) / se)),
        float(stdtr(dof, value / se)),
        value - half,
        value + half,
    )


def _status(value: float, lower: float, upper: float, margin: float) -> str:
    if lower > -margin:
        return "kept"
    return "lost" if upper < 0 and value < -margin else "unclear"


def _margin(margin: float) -> float:
    if not margin >= 0:
        raise HoldfastError(f"The margin is {margin}.", "Give the loss you can bear as a number >= 0, such as 0.02.")
    return float(margin)


def noninferiority(
    base: ArrayLike,
    tuned: ArrayLike,
    margin: float,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
) -> Verdict:
    """Return whether an ability was kept, lost, or whether these items (N,) cannot tell.

    'kept': the one-sided lower bound of the mean difference is above -margin.
    'lost': the one-sided upper bound is below 0 (a loss is real) and the estimate is below -margin (it is
    larger than can be borne). This holds in particular when the upper bound is below -margin.
    'unclear': neither. 'Not significant' alone is never 'kept'.

    Each bound is one-sided at `level`. 0/1 scores without clusters: Tango's score bound for 'kept' (the exact
    binomial one if nothing was gained) and the exact sign test for 'lost'; with clusters too when these show
    no spread, then with G in place of N. So no change in 20 items is not yet 'kept' at a margin of 0.02 (it
    takes 149). Otherwise: t with G-1 degrees of freedom.
    """
    margin, alpha = _margin(margin), _alpha(level)
    b, t = _pair(base, tuned)
    estimate = paired(b, t, clusters, level)
    group, g = _groups(clusters, b.size)
    se = _error(t - b, group, g) if g > 1 or (t != b).any() else 0.0
    if _binary(b, t) and (g == b.size or not 0 < se < math.inf):
        share = g / b.size
        result = _score_test((t > b).sum() * share, (t < b).sum() * share, g, margin, alpha)
    else:
        result = _t_test(estimate.value, se, g - 1, margin, alpha)
    p, p_loss, lower, upper = result
    return Verdict(_status(estimate.value, lower, upper, margin), p, estimate, margin, lower, upper, p_loss)


def noninferiority_draws(
    draws_of_difference: ArrayLike,
    margin: float,
    value: float | None = None,
    n: int = 0,
    level: float = 0.95,
) -> Verdict:
    """Return the verdict of noninferiority() from draws (B,) of a macro difference, or of a ratio minus 1.

    value: the estimate on the real items (default: mean of the draws). n: items, for the record only. p and
    p_loss count draws, with one added above and below, so they are never 0. Draws without spread are taken at
    their word: with few 0/1 items and no change, ask noninferiority() instead.
    """
    margin, alpha = _margin(margin), _alpha(level)
    x = _numbers(draws_of_difference, "draws_of_difference")
    value = float(x.mean()) if value is None else value
    lower, upper = (float(q) for q in np.quantile(x, [alpha, 1 - alpha]))
    p, p_loss = (float(1 + hit.sum()) / (x.size + 1) for hit in (x <= -margin, x >= 0))
    estimate = Estimate(value, *_ends(x, level), n)
    return Verdict(_status(value, lower, upper, margin), p, estimate, margin, lower, upper, p_loss)


def verdicts(
    abilities: Mapping[str, Task], margins: Mapping[str, float] | float, level: float = 0.95
) -> dict[str, Verdict]:
    """Return one verdict per ability (base, tuned, clusters); p_loss is Holm-adjusted over the abilities.

    'lost' needs the adjusted p_loss: an alarm goes off if ANY ability is lost, so without adjustment the
    false alarms add up; with it, the chance of one or more is at most 1 - level. 'kept' is each at `level`,
    with no adjustment: the claim is that ALL are kept, and for a conjunction (intersection-union test) the
    chance of a wrong claim is at most that of its weakest part. lower and upper stay unadjusted.
    """
    out = {}
    for name, (base, tuned, clusters) in abilities.items():
        if isinstance(margins, Mapping) and name not in margins:
            raise HoldfastError(f"Ability {name!r} has no margin.", f"Add {name!r} to the margins.")
        margin = margins[name] if isinstance(margins, Mapping) else margins
        out[name] = noninferiority(base, tuned, margin, clusters, level)
    adjusted = holm({name: v.p_loss for name, v in out.items()})
    for name, v in out.items():
        doubt = v.status == "lost" and adjusted[name] >= _alpha(level)
        out[name] = replace(v, p_loss=adjusted[name], status="unclear" if doubt else v.status)
    return out


# ---------------------------------------------------------------- calibration, power


def _probabilities(prob: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    p, y = _numbers(prob, "prob"), _numbers(correct, "correct")
    if p.size != y.size or p.min() < 0 or p.max() > 1 or not _binary(y):
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


def power(n: float, discordant: float, delta: float, level: float = 0.95) -> float:
    """Return the chance that n paired 0/1 items show a true loss of `delta` (a fraction, 0.03 = 3 points).

    discordant: fraction of items whose mark changes (0.1 to 0.2 is usual; at least delta). Normal
    approximation, var(d) = discordant - delta^2, two-sided level: a little careful for the one-sided verdict.
    """
    if n < 1 or not 0 <= discordant <= 1 or not 0 <= delta <= 1:
        raise HoldfastError(
            f"Power was asked for n={n}, discordant={discordant}, delta={delta}.",
            "Give n >= 1 and fractions between 0 and 1.",
        )
    se = math.sqrt((max(discordant, delta) - delta**2) / n)
    z = float(ndtri(1 - _alpha(level) / 2))
    return float(ndtr(delta / se - z)) if se > 0 else float(delta > 0)


def detectable(n: float, discordant: float, power: float = 0.9, level: float = 0.95) -> float:
    """Return the smallest true loss (a fraction) that n paired 0/1 items show with this power."""
    if not 0.5 <= power < 1:
        raise HoldfastError(f"The power is {power}.", "Give a power from 0.5 to below 1, such as 0.9.")
    return _crossing(lambda delta: power - _power(n, discordant, delta, level), 0.0, 1.0)


_power = power  # detectable has a parameter of the same name
