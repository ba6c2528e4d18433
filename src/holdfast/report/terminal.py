"""The report as a table that a person understands at a glance, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import schema

TONES = {"kept": "bold cyan", "lost": "bold red", "unclear": "bold yellow", "none": "dim"}


def _cell(value: str, span: str) -> Text:
    """A number with its interval dim below it: side by side would not fit 80 columns."""
    cell = Text(value)
    if span:
        cell.append(f"\n{span}", style="dim")
    return cell


def _score(est: Any) -> Text:
    return _cell(schema.number(est["value"]), schema.interval(est)) if schema.has(est) else Text("-", style="dim")


def _kept(ratio: Any) -> Text:
    if not schema.has(ratio):
        return Text("-", style="dim")
    return _cell(schema.percent(ratio["value"]), schema.percent_interval(ratio))


def _add_task(table: Table, part: dict[str, Any], name: Text, last: bool) -> None:
    """A row of the task: its scores, and the change in the metric's own unit."""
    name.append(f"\n{schema.metric_words(part)}" if name else schema.metric_words(part), style="dim")
    gain = part.get("difference")
    change = _cell(schema.number(gain["value"], True), schema.gain_words(part)) if schema.has(gain) else Text()
    table.add_row(name, _score(part.get("before")), _score(part.get("after")), "", change, end_section=last)


def _table(report: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("", overflow="fold", ratio=None, min_width=10, max_width=24)
    for title in ("before", "after", "kept"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    task = report.get("task")
    if task:
        more = [(f"on {schema.one_line(s['name'])}", s) for s in schema.set_parts(task)]
        more += [("", other) for other in task.get("others") or []]
        _add_task(table, task, Text(schema.one_line(task.get("name") or "task"), style="bold"), not more)
        for n, (name, part) in enumerate(more, 1):
            _add_task(table, part, Text(name), n == len(more))
    for ability in report.get("abilities") or []:
        look = schema.ability_status(ability)
        name = Text(schema.one_line(ability.get("name") or "?"))
        scores = (
            _score(ability.get("before")),
            _score(ability.get("after")),
            _kept(ability.get("retention")),
        )
        table.add_row(name, *scores, Text(look.word.lower(), style=TONES[look.tone]))
    return table


def show(report: dict[str, Any], console: Console, page: str | Path | None = None) -> None:
    """Print verdict, task, abilities and where the page lies.

    Args:
        report: as in `holdfast.report.schema.Report`.
        console: where to print; text of the report is never read as markup of rich.
        page: path of the HTML page, named in the last line when given.
    """
    r = schema.clean(report)
    look = schema.status_of(r.get("verdict"), r.get("kind"))
    names = [schema.one_line((r.get(part) or {}).get("name") or "") for part in ("model", "tuned")]
    console.print(Text(" -> ".join(n for n in names if n), style="dim"), overflow="fold")
    if r.get("task") or r.get("abilities"):
        console.print()
        console.print(_table(r))
    if (r.get("task") or {}).get("note"):
        console.print(Text(f"Note: {schema.one_line(r['task']['note'])}", style="dim"), overflow="fold")
    for ability in r.get("abilities") or []:
        if ability.get("note") and not ability.get("tasks"):  # why nothing of it could be asked
            said = f"Note: {schema.one_line(ability.get('name') or '?')}: {schema.one_line(ability['note'])}"
            console.print(Text(said, style="dim"), overflow="fold")
    line = Text(look.word.upper(), style=TONES[look.tone])
    sentence = schema.one_line((r.get("verdict") or {}).get("sentence") or "")
    console.print()
    console.print(line.append(f"  {sentence}" if sentence else "", style="not bold default"), overflow="fold")
    if page is not None:
        console.print(Text(f"Page: {schema.clean(str(page))}"), overflow="fold", soft_wrap=True)


def show_measured(suites: Sequence[Any], console: Console) -> None:
    """Print the scores of one model: a table for each suite, its further figures below it.

    Args:
        suites: measurements (`measure.asking.score_suite`).
    """
    from holdfast.measure.compare import ability
    from holdfast.recipe import KEEP_FRAC

    for measured in suites:
        part = schema.clean(ability(measured, None, KEEP_FRAC))
        table = Table("task", "score", "chance", title=Text(part["name"]), box=box.SIMPLE_HEAD, title_justify="left")
        for task in part["tasks"]:
            note = " (not measurable)" if task["status"] else ""
            table.add_row(Text(task["name"]), schema.estimate(task["before"]) + note, f"{task['chance']:.2f}")
        if part["before"]:
            table.add_row("mean of measurable tasks", schema.estimate(part["before"]), "", style="bold")
        console.print(table if part["tasks"] else Text(f"{part['name']}: {part['note'] or 'nothing to ask'}"))
        if words := schema.sight_words(part):
            console.print(Text(f"  a check with these items {words}", style="dim"))
        for name, (value, _) in part["facts"].items():
            console.print(Text(f"  {name}: {schema.number(value)}", style="dim"))
