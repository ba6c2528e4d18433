"""The advice that the reported numbers of a comparison bear: which plan to take, and what was not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.measure import stats
from holdfast.measure.packed import unpack
from holdfast.measure.stats import Estimate
from holdfast.runs.compare_ends import Ends, Runs

Row = Mapping[str, Any]
FASTER = 1.1  # ours: less is the noise of a clock


def advice(ends: Ends, rows: Sequence[Row], final: Mapping[str, Runs], seeds: int) -> str:
    """One sentence that the reported numbers support, and those without which it would say too much."""
    if not rows:
        return "No plan came to its end."
    return " ".join([_choice(ends, rows, final), *_unsaid(rows, seeds)])


def _choice(ends: Ends, rows: Sequence[Row], final: Mapping[str, Runs]) -> str:
    """Which plan to take."""
    good, must = [r for r in rows if r["status"] in ("kept", "no loss shown")], _must(ends, rows)
    if not good:
        near = next((f"; nearest in this list: {r['name']}" for r in rows if not r["few"]), "")
        return f"No plan is shown to {must}{near}."
    if len(good) == 1:
        return f"Take {good[0]['name']}: it alone is shown to {must}."
    first, second, must_both = good[0], good[1], must.replace("it must", "they must")
    apart = _apart(ends, final[first["name"]], final[second["name"]])
    words = "no seed in common" if apart is None else f"{apart.value:.3g} ({apart.low:.3g} to {apart.high:.3g})"
    if apart and apart.low > 0:
        return (
            f"Take {first['name']}: of those that {must_both}, it learns the task best; "
            f"the next, {second['name']}, is {words} behind."
        )
    cheap = min((first, second), key=lambda r: r["seconds"])
    if max(first["seconds"], second["seconds"]) < FASTER * cheap["seconds"]:
        return (
            f"Take {first['name']} or {second['name']}: both {must_both}, and neither their task "
            f"scores ({words}) nor their times can be told apart."
        )
    return (
        f"Take {cheap['name']}: {first['name']} and {second['name']} both {must_both}, their "
        f"task scores cannot be told apart ({words}), and it costs less time."
    )


def _must(ends: Ends, rows: Sequence[Row]) -> str:
    """What a plan has to be shown to do; "they" of several is put in by who says it of them."""
    unseen = {name for r in rows for name in r["unseen"]} - {*ends.asked}  # nobody asked for it, and nobody has it
    seen = {name: floor for name, floor in ends.floors.items() if name not in unseen}
    if not seen:
        return "keep anything, as measure.keep names nothing that could be seen"
    floors = ", ".join(f"{name} {floor:g}" for name, floor in seen.items())
    beside = " and lose nothing else" if any(r["lost_beside"] for r in rows) else ""
    return f"keep what it must ({floors}){beside}"


def _unsaid(rows: Sequence[Row], seeds: int) -> Iterator[str]:
    """What the sentence says nothing of."""
    unseen = ", ".join(dict.fromkeys(name for r in rows for name in r["unseen"]))
    if unseen:
        yield f"Not measurable with this model, so nothing is said of it: {unseen}."
    for r in rows:
        if r["lost_beside"]:
            yield f"{r['name']} loses {', '.join(r['lost_beside'])}, which measure.keep does not name."
        if r["few"]:
            yield f"{r['name']} came through with {len(r['seeds'])} of {seeds} seeds, too few for a verdict about it."


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
