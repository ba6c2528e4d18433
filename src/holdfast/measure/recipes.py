"""What several runs of one recipe (seeds) kept: a statement about the recipe, where one run speaks of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.measure import stats
from holdfast.measure.compare import ability
from holdfast.measure.sight import clusters_of

Part = dict[str, Any]


def kept(before: Part, afters: Sequence[Part], keep: float) -> Part:
    """One ability of a recipe from the base's measurement and those of its runs.

    Several runs: kept if the one-sided 95 % bound of the mean share lies above `keep`, lost if the mean lies below it
    and the bound of the loss excludes 0, else unclear (`stats.retention_of_runs`). One run: as `compare.ability`.

    Returns {"name", "status", "retention": {"value", "low", "high"} or None, "runs": share of each run}.
    """
    single = [ability(before, after, keep) for after in afters]
    first = single[0]
    part = {"name": first["name"], "status": first["status"], "retention": first["retention"], "runs": []}
    if first["retention"] is None:
        return part
    part["runs"] = [p["retention"]["value"] for p in single]
    if len(afters) == 1:
        return part
    tasks = {t["name"]: t for t in before["tasks"]}
    names = [t["name"] for t in first["tasks"] if t["status"] is None]
    sides = [{t["name"]: _scores(t) for t in after["tasks"]} for after in afters]
    pooled = {n: (_scores(tasks[n]), [side[n] for side in sides], clusters_of(tasks[n])) for n in names}
    ratio, drawn, part["runs"] = stats.retention_of_runs(pooled, {n: tasks[n]["chance"] for n in names})
    judged = stats.noninferiority_draws(drawn - 1, 1 - keep, ratio.value - 1)
    shown = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return {**part, "retention": shown, "status": judged.status}


def _scores(task: Mapping[str, Any]) -> list[float]:
    return [float(i["correct"]) for i in task["items"]]
