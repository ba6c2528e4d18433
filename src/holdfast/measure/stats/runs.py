"""Figures of a recipe: over several training runs (seeds) and the items of several tasks.

Two sources of error, drawn independently: which items were asked (clusters within tasks, the same for all runs, since
a hard item is hard in every run) and which seeds were run. The seeds are so few that their part is drawn from a t
distribution with S - 1 degrees of freedom around the mean of the runs, and not resampled: two runs that agree by luck
would else look certain.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from holdfast.errors import HoldfastError
from holdfast.measure.stats.bootstrap import quantile_ends, task_draws
from holdfast.measure.stats.given import chance_of
from holdfast.measure.stats.intervals import seeds
from holdfast.measure.stats.records import Estimate, Ratio

RunsTask = tuple[ArrayLike, Sequence[ArrayLike], "ArrayLike | None"]  # base (N,), one (N,) per run, clusters or None


def retention_of_runs(
    tasks: Mapping[str, RunsTask],
    chance: Mapping[str, float],
    level: float = 0.95,
    draws: int = 4000,
    stream: int = 0,
) -> tuple[Ratio, np.ndarray, list[float]]:
    """Return the mean retention of the runs with its interval, draws (draws,) of it, and the retention of each run.

    Retention is that of `retention`: the chance-normalised macro mean of tuned over that of base. With one run there
    is no part of the seeds, and the interval speaks of that run alone.

    Raises:
        HoldfastError: there is no task or no run, or the tasks have different numbers of runs.
    """
    if not tasks:
        raise HoldfastError("There is no task to average over.", "Give at least one task.")
    counts = {len(runs) for _, runs, _ in tasks.values()}
    if len(counts) != 1 or 0 in counts:
        what = f"The tasks have {sorted(counts)} runs."
        raise HoldfastError(what, "Give every task one list of scores for each run, and at least one run.")
    num_runs = counts.pop()
    base, moved, base_draws, moved_draws = 0.0, np.zeros(num_runs), np.zeros(draws), np.zeros((draws, num_runs))
    for name in sorted(tasks):
        c = chance_of(chance, name)
        rng = np.random.default_rng([stream, zlib.crc32(name.encode())])
        at, found, _ = task_draws(*tasks[name], draws, rng)
        base, moved = base + (at[0] - c) / (1 - c), moved + at[1:] / (1 - c)
        base_draws += (found[:, 0] - c) / (1 - c)
        moved_draws += found[:, 1:] / (1 - c)
    if base <= 1e-12 or base / len(tasks) < 2 * float((base_draws / len(tasks)).std()):
        return Ratio(math.nan, math.nan, math.nan, False), np.full(draws, math.nan), []
    good = base_draws > 0
    each = 1 + moved / base
    drawn = 1 + moved_draws[good].mean(1) / base_draws[good]
    if num_runs > 1:
        rng = np.random.default_rng([stream, num_runs])
        drawn = drawn + each.std(ddof=1) / math.sqrt(num_runs) * rng.standard_t(num_runs - 1, drawn.size)
    return Ratio(float(each.mean()), *quantile_ends(drawn, level), True), drawn, [float(x) for x in each]


def mean_of_runs(each: Sequence[Estimate], level: float = 0.95) -> Estimate:
    """Return the mean of the same figure of several runs, whose intervals speak of the items alone.

    The widths add up in quadrature: that of the items (the runs answered the same ones, so it does not shrink with
    their number) and the t interval of the mean over the runs, with S - 1 degrees of freedom. One run is itself.

    Raises:
        HoldfastError: there is no run.
    """
    if not each:
        raise HoldfastError("There is no run to average over.", "Give at least one.")
    if len(each) == 1:
        return each[0]
    spread = seeds([e.value for e in each], level)
    low = math.hypot(float(np.mean([e.value - e.low for e in each])), spread.value - spread.low)
    high = math.hypot(float(np.mean([e.high - e.value for e in each])), spread.high - spread.value)
    return Estimate(spread.value, spread.value - low, spread.value + high, each[0].n)
