"""One sentence of advice that the reported numbers of a comparison bear."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.measure import stats
from holdfast.measure.packed import unpack
from holdfast.measure.stats import Estimate
from holdfast.runs.compare_ends import Ends, Runs

FASTER = 1.1  # ours: less is the noise of a clock


def advice(ends: Ends, rows: Sequence[Mapping[str, Any]], final: Mapping[str, Any]) -> str:
    """One sentence that the reported numbers support."""
    good = [r for r in rows if r["status"] in ("kept", "no loss shown")]
    floors = ", ".join(f"{name} {floor:g}" for name, floor in ends.floors.items())
    if not rows:
        return "No plan came to its end."
    if not good:
        return f"No plan is shown to keep what it must ({floors}); nearest in this list: {rows[0]['name']}."
    if len(good) == 1:
        return f"Take {good[0]['name']}: it alone is shown to keep what it must ({floors})."
    first, second = good[0], good[1]
    apart = _apart(ends, final[first["name"]], final[second["name"]])
    words = "no seed in common" if apart is None else f"{apart.value:.3g} ({apart.low:.3g} to {apart.high:.3g})"
    if apart and apart.low > 0:
        return (
            f"Take {first['name']}: of those that keep what they must ({floors}), it learns the task best; "
            f"the next, {second['name']}, is {words} behind."
        )
    cheap = min((first, second), key=lambda r: r["seconds"])
    if max(first["seconds"], second["seconds"]) < FASTER * cheap["seconds"]:
        return (
            f"Take {first['name']} or {second['name']}: both keep what they must ({floors}), and neither their task "
            f"scores ({words}) nor their times can be told apart."
        )
    return (
        f"Take {cheap['name']}: {first['name']} and {second['name']} both keep what they must ({floors}), their "
        f"task scores cannot be told apart ({words}), and it costs less time."
    )


def _apart(ends: Ends, one: Runs, other: Runs) -> Estimate | None:
    """How much better the first plan's task score is, paired by item and seed; None without a seed in common."""
    theirs, each = {cell.seed: found for cell, found in other}, []
    for cell, mine in one:
        if cell.seed in theirs:  # a run that failed has no partner
            against = unpack(theirs[cell.seed]["task"], ends.base["task"])
            each.append(Estimate.from_dict(ends.task(mine, against)["difference"]))
    if not each:
        return None
    mean = stats.mean_of_runs(each)
    return dataclasses.replace(mean, value=-mean.value, low=-mean.high, high=-mean.low) if ends.metric.lower else mean
