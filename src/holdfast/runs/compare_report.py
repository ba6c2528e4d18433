"""The outcome of a comparison: what each plan learnt and kept, its frontier, and a ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from holdfast.measure import stats
from holdfast.measure.stats import Estimate
from holdfast.runs.compare_advice import advice
from holdfast.runs.compare_ends import Ends, Runs, bound
from holdfast.runs.repair_search import Point
from holdfast.versions import versions

ORDER = ("kept", "no loss shown", "unclear", "lost")  # the best first


def compared(
    ends: Ends,
    choosing: Ends | None,
    trials: Mapping[str, Sequence[Point]],
    final: Mapping[str, Runs],
    failed: Mapping[str, str],
    seeds: int,
) -> dict[str, Any]:
    """Everything for compare.json: what chose the settings stands beside, and never inside, what is reported.

    ends, choosing: of the half that is reported on, and of the one that the trials were chosen on, if any were.
    """
    rows = [_row(ends, name, trials[name], runs, seeds) for name, runs in final.items() if runs]
    half, looked = (choosing, trials) if choosing else (ends, {row["name"]: _looks(ends, row) for row in rows})
    best = max((p.value for points in looked.values() for p in points), default=0.0)
    base = half.value(half.task_of_base())
    for row in rows:
        row["hypervolume"] = hypervolume([_corner(p, ends.floors, base, best) for p in looked[row["name"]]])
    rows.sort(key=lambda r: (ORDER.index(r["status"]), r["few"], -ends.value(r["task"])))
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
            "base": ends.task_of_base(),
        },
        "keep": dict(ends.floors),
        "seeds": seeds,
        "rows": rows,
        "advice": advice(ends, rows, final, seeds),
        "failed": dict(failed),
    }


def _row(ends: Ends, name: str, trials: Sequence[Point], runs: Runs, seeds: int) -> dict[str, Any]:
    """One plan at its chosen settings, over those of its seeds that came through."""
    found = [one for _, one in runs]
    each = [Estimate.from_dict(ends.task(one)["after"]) for one in found]
    abilities, few = ends.abilities(found), len(runs) < min(2, seeds)
    return {
        "name": name,
        "learning_rate": found[0]["learning_rate"],
        "strength": runs[0][0].strength,
        "task": stats.mean_of_runs(each).to_dict(),
        "abilities": abilities,
        "status": "unclear" if few else _status(ends, abilities),
        "few": few,  # one run alone says nothing of the plan
        "unseen": _unseen(ends, abilities),
        "lost_beside": [a["name"] for a in abilities if a["status"] == "lost" and a["name"] not in ends.floors],
        "seeds": [cell.seed for cell, _ in runs],
        "seconds": sum(one["seconds"] for one in found) / len(found),
        "tokens_per_second": sum(one["tokens_per_second"] for one in found) / len(found),
        "trials": [
            {"factor": p.candidate.factor, "strength": p.candidate.strength, "margin": p.margin, **p.shown}
            for p in trials
        ],
    }


def _status(ends: Ends, abilities: Sequence[Mapping[str, Any]]) -> str:
    """The worst of what must be kept, or any loss beside; what the recipe asks for and cannot be seen is not kept."""
    if any(a["status"] == "lost" for a in abilities):
        return "lost"
    found = [a["status"] for a in bound(ends, abilities)]
    if set(_unseen(ends, abilities)) & set(ends.asked) or not found:
        found.append("unclear")
    return max(found, key=ORDER.index)


def _unseen(ends: Ends, abilities: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be kept and the base is not shown to have."""
    seen = [a["name"] for a in bound(ends, abilities)]
    return [name for name in ends.floors if name not in seen]


def _looks(ends: Ends, row: Mapping[str, Any]) -> list[Point]:
    """A plan with a single trial: what is reported of it, over its seeds."""
    kept = {a["name"]: a["retention"] for a in row["abilities"] if a["retention"]}
    return [Point(row["name"], ends.value(row["task"]), 0.0, ("report",), {"kept": kept})]


def _corner(point: Point, floors: Mapping[str, float], base: float, best: float) -> tuple[float, float]:
    """(share of the largest gain of all plans, least share kept of an ability with a floor), both from 0 to 1."""
    gain = (point.value - base) / (best - base) if best > base else 0.0
    kept = [share["value"] for name, share in point.shown["kept"].items() if name in floors]
    return min(1.0, max(0.0, gain)), min(1.0, max(0.0, min(kept, default=0.0)))


def hypervolume(corners: Sequence[tuple[float, float]]) -> float:
    """The area that points (x, y) dominate above (0, 0): the union of the rectangles from there to each of them."""
    area, height = 0.0, 0.0
    for x, y in sorted(corners, reverse=True):
        area, height = area + x * max(0.0, y - height), max(height, y)
    return area
