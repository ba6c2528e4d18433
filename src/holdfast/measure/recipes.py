"""What several runs of one recipe (seeds) kept: a statement about the recipe, where one run speaks of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.measure import stats
from holdfast.measure.compare import ability, corrected
from holdfast.measure.sight import clusters_of

Part = dict[str, Any]


def abilities(
    befores: Sequence[Part], runs: Sequence[Sequence[Part]], floors: Mapping[str, float], floor: float
) -> list[Part]:
    """Every ability of a recipe, judged together as `compare.abilities` judges those of one run.

    runs: for each the measurements after it, in the order of `befores`.
    """
    parts = [
        kept(b, [run[n] for run in runs], floors.get(b["suite"], floor), b["suite"] in floors)
        for n, b in enumerate(befores)
    ]
    return corrected(parts)


def kept(before: Part, afters: Sequence[Part], keep: float, required: bool = True) -> Part:
    """One ability of a recipe from the base's measurement and those of its runs, as `compare.ability` gives it.

    Several runs: kept if the one-sided 95 % bound of the mean share lies above `keep`, lost if the mean lies below it
    and the bound of the loss excludes 0, else unclear (`stats.retention_of_runs`), or "no loss shown" as there. One
    run is judged as ever.

    "runs" has the share that each run kept.
    """
    single = [ability(before, after, keep, required) for after in afters]
    first = single[0]
    if first["retention"] is None:
        return {**first, "runs": []}
    if len(single) == 1:
        return {**first, "runs": [first["retention"]["value"]]}
    ratio, drawn, each = stats.retention_of_runs(*_pooled(first, before, afters))
    judged = stats.noninferiority_draws(drawn - 1, 1 - keep, ratio.value - 1)
    mean = {k: _mean([p[k] for p in single]) for k in ("after", "difference")}
    tasks = [
        {**t, **{k: _mean([p["tasks"][n][k] for p in single]) for k in ("after", "difference")}}
        for n, t in enumerate(first["tasks"])
    ]
    still = judged.status == "kept" and all(p["difference"]["value"] == 0 for p in single)
    status = first["status"] if still else judged.status  # no change at all is no proof where there are few items
    if status == "unclear" and any(p["status"] == "no loss shown" for p in single):
        status = "no loss shown"
    shown = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    rest = {"curve": None, "facts": {}, "p_loss": judged.p_loss, "runs": each}  # of single runs only
    return {**first, **mean, **rest, "tasks": tasks, "retention": shown, "status": status}


def _pooled(first: Part, before: Part, afters: Sequence[Part]) -> tuple[dict[str, Any], dict[str, float]]:
    """What `stats.retention_of_runs` takes, of the tasks that are measurable."""
    tasks = {t["name"]: t for t in before["tasks"]}
    names = [t["name"] for t in first["tasks"] if t["status"] is None]
    sides = [{t["name"]: _scores(t) for t in after["tasks"]} for after in afters]
    pooled = {n: (_scores(tasks[n]), [side[n] for side in sides], clusters_of(tasks[n])) for n in names}
    return pooled, {n: tasks[n]["chance"] for n in names}


def _mean(each: Sequence[Any]) -> Part:
    return stats.mean_of_runs([stats.Estimate.from_dict(e) for e in each]).to_dict()


def _scores(task: Mapping[str, Any]) -> list[float]:
    return [float(i["correct"]) for i in task["items"]]
