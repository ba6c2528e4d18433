"""The report as one HTML file: no network, no scripts, readable on a phone, in light and dark."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from . import plots, schema
from .ends import ends_of

_ARXIV = re.compile(r"(\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7})(v\d+)?")


def arxiv_url(number: Any) -> str | None:
    """The address of a paper, or None for anything that is not an arXiv number."""
    text = str(number or "").removeprefix("arXiv:").strip()
    return f"https://arxiv.org/abs/{text}" if _ARXIV.fullmatch(text) else None


def plain(value: Any) -> str:
    """A setting as a person writes it: text as it is, floats short, the rest as JSON."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def whole(value: Any) -> str:
    """A count with commas: '129,333'; 'n/a' for anything that is no number."""
    return f"{value:,.0f}" if isinstance(value, (int, float)) else "n/a"


def _value_words(row: dict[str, Any]) -> str:
    there = [schema.number(row[w]["value"]) for w in ("before", "after") if schema.has(row.get(w))]
    return " \u2192 ".join(there) or "n/a"


def _row(part: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**part, "words": _value_words(part), **more}


def _panel(head: dict[str, Any], tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one block of the dot plot: one for the whole and one for every part that has a score."""
    rows = [_row(head, head=True)] + [_row(t, head=False) for t in tasks]
    return [r for r in rows if schema.has(r.get("before")) or schema.has(r.get("after"))]


def _numbers_of(rows: list[dict[str, Any]]) -> list[float | None]:
    return [v for r in rows for v in [*plots.est_values(r.get("before"), r.get("after")), r.get("chance")]]


def _is_share(rows: list[dict[str, Any]]) -> bool:
    """Whether a block is of scores from 0 to 1 where more is better; a small loss is not."""
    return plots.is_share(_numbers_of(rows)) and not any(r.get("lower") for r in rows)


def _task_parts(task: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """(name, part) of the task and of its further metrics; what is no share of rows has its unit in the name."""
    if not task:
        return []
    plain = task.get("metric") if task.get("unit") else ""
    first = f"Your task: {task.get('name') or '?'}" + (f", {schema.metric_words(task)}" if plain else "")
    sets = [(f"Your task on {part['name']}", part) for part in schema.set_parts(task)]
    return [(first, task), *sets, *((f"Your task, {schema.metric_words(o)}", o) for o in task.get("others") or [])]


def _panels(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks of the dot plot. All scores of 0 to 1 share one axis, so that blocks can be compared."""
    task = report.get("task")
    heads = [({**part, "name": name}, []) for name, part in _task_parts(task)]
    heads += [(a, a.get("tasks") or []) for a in report.get("abilities") or []]
    blocks = [rows for rows in (_panel(head, tasks) for head, tasks in heads) if rows]
    shared = plots.share_axis(v for rows in blocks for v in _numbers_of(rows) if _is_share(rows))
    panels = []
    for rows in blocks:
        axis = shared if _is_share(rows) else plots.nice_axis(_numbers_of(rows))
        for row in rows:
            row["look"] = schema.status_of(row) if row.get("status") else None
            row["svg"] = plots.strip_svg(row, axis)
        panels.append({"rows": rows, "axis": plots.axis_svg(axis)})
    return panels


def _task_card(task: dict[str, Any] | None) -> dict[str, Any] | None:
    there = [e for e in ((task or {}).get("before"), (task or {}).get("after")) if schema.has(e)]
    if not task or not there:
        return None
    gain = task.get("difference") if schema.has(task.get("difference")) else None
    words = schema.metric_words(task)
    lines = [f"{words} on {task['name']}" if task.get("name") else words if task.get("metric") else ""]
    if gain:
        span, verdict = schema.interval(gain, sign=True), schema.gain_words(task)
        words = f"{schema.number(gain['value'], True)}" + (f" (95 % interval {span})" if span else "")
        lines.append(words + (f": {verdict}" if verdict else ""))
    elif len(there) == 1 and schema.has_interval(there[0]):
        lines.append(f"95 % interval {schema.interval(there[0])}")
    n = there[-1].get("n")
    facts = [f"{n:,} items" if n else "", f"{task['split']} split" if task.get("split") else ""]
    facts.append(f"guessing gives {schema.number(task['chance'])}" if task.get("chance") is not None else "")
    lines.append(", ".join(f for f in facts if f))
    return {
        "title": "Your task",
        "big": _value_words(task),
        "lines": [x for x in lines if x],
        "note": task.get("note"),
    }


def _counts(abilities: list[dict[str, Any]]) -> str:
    words = [schema.ability_status(a).word.lower() for a in abilities]
    return ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))


def _kept_card(abilities: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The least kept ability, for a mean would hide the one that broke."""
    if not abilities:
        return None
    rated = [a for a in abilities if schema.has(a.get("retention"))]
    if not rated:
        one = abilities[0] if len(abilities) == 1 else None
        big = _value_words(one) if one else f"{len(abilities)}"
        return {
            "title": f"Ability: {one['name']}" if one else "Abilities",
            "big": big,
            "lines": [_counts(abilities)],
        }
    least = min(rated, key=lambda a: a["retention"]["value"])
    span = schema.percent_interval(least["retention"])
    of = f"of {(least.get('name') or '?')}" + (" is kept" if len(abilities) == 1 else ", the least kept ability")
    lines = [of, f"95 % interval {span}" if span else "", f"all abilities: {_counts(abilities)}"]
    lines = [x for x in lines[: 2 if len(abilities) == 1 else 3] if x]
    return {"title": "Abilities kept", "big": schema.percent(least["retention"]["value"]), "lines": lines}


def _curves(report: dict[str, Any]) -> list[dict[str, Any]]:
    there = [a for a in report.get("abilities") or [] if (a.get("curve") or {}).get("shots")]
    return [
        {
            "name": (a.get("name") or "?"),
            "svg": plots.shots_svg(a["curve"], f"{(a.get('name') or '?')} by number of examples"),
        }
        for a in there
    ]


def _losses(training: dict[str, Any] | None) -> list[dict[str, Any]]:
    known = training or {}
    looks = {f"Look: {k}": v for k, v in (known.get("looks") or {}).items()}
    lines = {"Loss": known.get("loss") or [], **(known.get("terms") or {}), **looks}
    drawn = [
        {"name": k, "svg": plots.series_svg(v, f"{k} by step"), "mean_of": plots.thin(v)[1]}
        for k, v in lines.items()
        if v
    ]
    return [d for d in drawn if d["svg"]]


def _numbers(report: dict[str, Any]) -> list[list[str]]:
    """The table behind the dot plot, with nothing rounded away by a picture."""
    rows = []
    parts = [{**part, "name": name} for name, part in _task_parts(report.get("task"))]
    for ability in report.get("abilities") or []:
        parts += [ability, *(ability.get("tasks") or [])]
    for p in parts:
        n = p.get("n") or (p.get("after") or p.get("before") or {}).get("n")
        scores = [schema.estimate(p.get("before")), schema.estimate(p.get("after"))]
        change = schema.estimate(p.get("difference"), sign=True)
        rows.append(
            [
                (p.get("name") or "?"),
                *scores,
                change,
                schema.number(p.get("chance")),
                f"{n:,}" if n else "n/a",
            ]
        )
    return rows


def _further(abilities: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [f"{a.get('name') or '?'}: {name}", *map(schema.number, values)]
        for a in abilities
        for name, values in (a.get("facts") or {}).items()
    ]


@cache
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # for every string: what a model wrote must never become markup
        undefined=ChainableUndefined,
        finalize=lambda value: "" if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = (
        "number",
        "estimate",
        "interval",
        "percent",
        "duration",
        "status_of",
        "ability_status",
        "ability_words",
        "sight_words",
    )
    env.filters.update({name: getattr(schema, name) for name in names})
    env.filters.update({"plain": plain, "arxiv_url": arxiv_url, "whole": whole})
    return env


def render(report: dict[str, Any]) -> str:
    """The whole page.

    Args:
        report: as in `holdfast.report.schema.Report`. Text in it is shown as text, whatever it holds.

    Returns:
        One HTML document that loads nothing.
    """
    r = schema.clean(report)
    abilities = r.get("abilities") or []
    cards = [c for c in (_task_card(r.get("task")), _kept_card(abilities)) if c]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            r=r,
            verdict=schema.status_of(r.get("verdict"), r.get("kind")),
            cards=cards,
            abilities=abilities,
            panels=_panels(r),
            curves=_curves(r),
            further=_further(abilities),
            losses=_losses(r.get("training")),
            ends=ends_of(r.get("training"), r.get("task")),
            numbers=_numbers(r),
            dots={k: Markup(_LEGEND.format(k)) for k in ("before", "after")},
        )
    )


_LEGEND = (
    '<svg class="key" width="34" height="12" aria-hidden="true">'
    '<line class="iv {0}" x1="1" x2="33" y1="6" y2="6"/>'
    '<circle class="dot {0}" cx="17" cy="6" r="4.5"/></svg>'
)


def write(report: dict[str, Any], path: str | Path) -> Path:
    """Render the report into a file (UTF-8; folders are made) and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8", newline="\n")
    return path
