"""The ends that a run under a budget looked at: shares of its change, and of a healing, with what each scored."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from . import schema
from .plots import tradeoff_svg
from .repair import share


def ends_of(training: dict[str, Any] | None, task: dict[str, Any] | None) -> dict[str, Any] | None:
    """{"head", "rows": cells, "figures": [{"name", "svg"}]} of a report; None where there is nothing to compare.

    A loss has no place on an axis of shares, so it has no picture.
    """
    budget = (training or {}).get("budget") or {}
    points = budget.get("points") or []
    if len(points) < 2:
        return None
    names = list(dict.fromkeys(name for p in points for name in p.get("kept") or {}))
    rows = [
        [_label(p), schema.estimate(p.get("task")), *(share(p["kept"].get(name)) for name in names), _meets(p)]
        for p in points
    ]
    figures = [
        {"name": f"{name} kept", "svg": Markup(tradeoff_svg(_dots(budget, points, name), "task", f"{name} kept"))}
        for name in names
        if not (task or {}).get("lower")
    ]
    return {"head": ["End", "Task", *names, "Meets the bounds"], "rows": rows, "figures": figures}


def _label(point: dict[str, Any]) -> str:
    return f"{schema.percent(point.get('share'))} of the {'healing' if point.get('healed') else 'change'}"


def _meets(point: dict[str, Any]) -> str:
    return "yes" if point.get("meets") else "by the estimate" if point.get("may_meet") else "no"


def _dots(budget: dict[str, Any], points: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    end = (budget.get("share"), budget.get("healed"))
    return [
        {
            "name": _label(p),
            "task": p.get("task"),
            "kept": p["kept"].get(name),
            "highlight": (p.get("share"), p.get("healed")) == end,
        }
        for p in points
    ]
