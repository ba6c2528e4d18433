"""The outcome of a comparison: what each plan learnt and kept, its frontier, a ranking, and one sentence of advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from holdfast.data.metric import metric_of
from holdfast.measure import recipes, stats
from holdfast.measure.packed import unpack, unpack_suite
from holdfast.measure.stats import Estimate
from holdfast.measure.tuned_task import task_estimates
from holdfast.recipe import KEEP_FRAC
from holdfast.runs.contestants import Cell
from holdfast.runs.repair_search import Point, sure
from holdfast.versions import versions

Measured = Mapping[str, Any]
SHOWN = ("name", "status", "before", "after", "retention", "runs")
FASTER = 1.1  # ours: less is the noise of a clock
Runs = Sequence[tuple[Cell, Measured]]
ORDER = ("kept", "no loss shown", "unclear", "lost")  # the best first


@dataclass(frozen=True)
class Ends:
    """The base's side of one half: the task's name and metric, its scores, and the share to keep of each ability."""

    about: Mapping[str, Any]
    base: Measured
    floors: Mapping[str, float]

    @property
    def metric(self) -> Any:
        return metric_of(self.about["metric"])

    def task(self, found: Measured, against: Sequence[Any] | None = None) -> dict[str, Any]:
        """{"before", "after", "difference"} of a run's task, against the base's items or those given."""
        items = unpack(found["task"], self.base["task"])
        return task_estimates(self.metric, self.base["task"] if against is None else against, items)

    def abilities(self, runs: Sequence[Measured]) -> list[dict[str, Any]]:
        """Each ability of a recipe from its runs (`measure.recipes.abilities`)."""
        befores = self.base["abilities"]
        afters = [[unpack_suite(a, b) for a, b in zip(run["abilities"], befores, strict=True)] for run in runs]
        return [{k: part[k] for k in SHOWN} for part in recipes.abilities(befores, afters, self.floors, KEEP_FRAC)]

    def value(self, estimate: Mapping[str, Any]) -> float:
        """One number of a task score, higher is better."""
        return -estimate["value"] if self.metric.lower else estimate["value"]


def point_of(ends: Ends, cell: Cell, found: Measured) -> Point:
    """A run on the choosing half: its task score, and how far it stands above what must be kept."""
    task, abilities = ends.task(found)["after"], ends.abilities([found])
    margins = [sure(a["retention"]) - ends.floors[a["name"]] for a in _bound(ends, abilities)]
    shown = {"task": task, "kept": _shares(abilities), "learning_rate": found["learning_rate"]}
    shown["early"] = found.get("early")  # a run of an older version has none
    return Point(cell, ends.value(task), min(margins, default=0.0), ("choose",), shown)


def compared(
    ends: Ends,
    trials: Mapping[str, Sequence[Point]],
    final: Mapping[str, Sequence[tuple[Cell, Measured]]],
    failed: Mapping[str, str],
    seeds: int,
) -> dict[str, Any]:
    """Everything for compare.json: what chose the settings stands beside, and never inside, what is reported."""
    rows = [_row(ends, name, trials[name], runs) for name, runs in final.items() if runs]
    best = max((p.value for points in trials.values() for p in points), default=0.0)
    base = ends.value(task_estimates(ends.metric, ends.base["task"], ends.base["task"])["after"])
    for row in rows:
        row["hypervolume"] = hypervolume([_corner(p, ends, base, best) for p in trials[row["name"]]])
    rows.sort(key=lambda r: (ORDER.index(r["status"]), -ends.value(r["task"])))
    used = versions()
    return {
        "holdfast_version": used["holdfast"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": "compare",
        "versions": used,
        "task": {
            **ends.about,
            "metric": ends.metric.words,
            "unit": ends.metric.unit,
            "lower": ends.metric.lower,
            "base": task_estimates(ends.metric, ends.base["task"], ends.base["task"])["after"],
        },
        "keep": dict(ends.floors),
        "seeds": seeds,
        "rows": rows,
        "advice": _advice(ends, rows, final),
        "failed": dict(failed),
    }


def _row(ends: Ends, name: str, trials: Sequence[Point], runs: Sequence[tuple[Cell, Measured]]) -> dict[str, Any]:
    """One plan at its chosen settings, over its seeds."""
    found = [one for _, one in runs]
    each = [Estimate.from_dict(ends.task(one)["after"]) for one in found]
    abilities = ends.abilities(found)
    worst = [a["status"] for a in _bound(ends, abilities)]
    return {
        "name": name,
        "learning_rate": found[0]["learning_rate"],
        "strength": runs[0][0].strength,
        "task": stats.mean_of_runs(each).to_dict(),
        "abilities": abilities,
        "status": max(worst, key=ORDER.index) if worst else "unclear",
        "seeds": [cell.seed for cell, _ in runs],
        "seconds": sum(one["seconds"] for one in found) / len(found),
        "tokens_per_second": sum(one["tokens_per_second"] for one in found) / len(found),
        "trials": [
            {"factor": p.candidate.factor, "strength": p.candidate.strength, "margin": p.margin, **p.shown}
            for p in trials
        ],
    }


def _bound(ends: Ends, abilities: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The abilities with a floor that could be measured at all."""
    return [a for a in abilities if a["name"] in ends.floors and a["retention"]]


def _shares(abilities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {a["name"]: a["retention"] for a in abilities if a["retention"]}


def _corner(point: Point, ends: Ends, base: float, best: float) -> tuple[float, float]:
    """(share of the largest gain of all plans, least share kept of an ability with a floor), both from 0 to 1."""
    gain = (point.value - base) / (best - base) if best > base else 0.0
    kept = [share["value"] for name, share in point.shown["kept"].items() if name in ends.floors]
    return min(1.0, max(0.0, gain)), min(1.0, max(0.0, min(kept, default=0.0)))


def hypervolume(corners: Sequence[tuple[float, float]]) -> float:
    """The area that points (x, y) dominate above (0, 0): the union of the rectangles from there to each of them."""
    area, height = 0.0, 0.0
    for x, y in sorted(corners, reverse=True):
        area, height = area + x * max(0.0, y - height), max(height, y)
    return area


def _advice(ends: Ends, rows: Sequence[Mapping[str, Any]], final: Mapping[str, Any]) -> str:
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
