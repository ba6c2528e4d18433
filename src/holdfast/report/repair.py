"""The outcome of a repair: a table for the terminal, Markdown, and a page with the curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import escape as html
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import schema
from .markdown import escape
from .plots import tradeoff_svg
from .terminal import TONES

Part = Mapping[str, Any]
WORDS = {"not met": "BOUND NOT MET", "lost": "LOST", "unclear": "NOT PROVEN", "kept": "REPAIRED"}
TONE = {"not met": "lost", "lost": "lost", "unclear": "unclear", "kept": "kept"}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.chosen{font-weight:bold}svg{max-width:100%;height:auto}"
    "p,h1,h2,td{overflow-wrap:anywhere}.wide{overflow-x:auto}td{min-width:4rem}"
)


def show(report: Part, console: Console) -> None:
    """Print the curve, what the report's own items say, and the verdict."""
    r = schema.clean(dict(report))
    names = list(r["keep"])
    table = Table("for choosing", "items", "task", *names, box=box.SIMPLE_HEAD, header_style="dim")
    for cells, chosen in _curve(r, names):
        table.add_row(*map(Text, cells), style="bold" if chosen else "")
    console.print(table)
    outcome = Table("on other items", "base", "tuned", "repaired", "kept", box=box.SIMPLE_HEAD, header_style="dim")
    for cells in _outcome(r):
        outcome.add_row(*map(Text, cells))
    console.print(outcome)
    line = Text(WORDS[r["status"]], style=TONES[TONE[r["status"]]])
    console.print(line.append(f"  {schema.one_line(r['sentence'])}", style="not bold default"), overflow="fold")


def markdown(report: Part) -> str:
    """The same as Markdown. Intervals are of 95 %."""
    r = schema.clean(dict(report))
    names = list(r["keep"])
    lines = [f"### {WORDS[r['status']].capitalize()}", "", escape(r["sentence"]), ""]
    lines += md_table(["on other items", "base", "tuned", "repaired", "kept"], _outcome(r))
    rows = [[f"**{c}**" if chosen else c for c in map(escape, cells)] for cells, chosen in _curve(r, names)]
    lines += [*md_table(["candidate", "items", "task", *map(escape, names)], rows)]
    lines.append(f"<sub>Holdfast {escape(r['holdfast_version'])}; in brackets: 95 % intervals.</sub>")
    return "\n".join(lines) + "\n"


def page(report: Part) -> str:
    """The same as one HTML file without scripts, with a picture of the curve for each ability that is kept."""
    r = schema.clean(dict(report))
    names = list(r["keep"])
    task = r["report"]["task"]
    pictures = [
        f"<h2>{html(name)}</h2>" + tradeoff_svg(_dots(r, name), task["metric"], f"{name} kept") for name in names
    ]
    body = [
        f"<h1>{html(WORDS[r['status']].capitalize())}</h1><p>{html(r['sentence'])}</p>",
        f"<p>{html(r['base']['name'])} &rarr; {html(r['tuned']['name'])}</p>",
        *pictures,
        "<p>Every dot is a candidate on the items for choosing; the named one is the chosen one.</p>",
        "<h2>On items that chose nothing</h2>",
        html_table(["", "base", "tuned", "repaired", "kept"], [(cells, False) for cells in _outcome(r)]),
        "<h2>All candidates</h2>",
        html_table(["candidate", "items", "task", *names], list(_curve(r, names))),
        f"<p>Holdfast {html(r['holdfast_version'])}; in brackets: 95 % intervals.</p>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    start = f'<!doctype html><html lang="en"><head>{head}<title>Repair</title></head>'
    return f"{start}<body>{''.join(body)}</body></html>\n"


def _curve(r: Part, names: Sequence[str]) -> Iterator[tuple[list[str], bool]]:
    """(cells, is it the chosen one) of every point, the second look first."""
    for p in sorted(r["points"], key=lambda p: -len(p["parts"])):
        kept = [share(p["kept"].get(name)) for name in names]
        chosen = p["label"] == r["chosen"]["label"] and p["parts"] == r["chosen"]["parts"]
        yield [p["label"], " + ".join(p["parts"]), schema.estimate(p["task"]), *kept], chosen


def _outcome(r: Part) -> Iterator[list[str]]:
    """Rows on the items of the report: the task, then every ability."""
    task = r["report"]["task"]
    sides = [schema.estimate(task[side]) for side in ("base", "tuned", "repaired")]
    yield [f"{task['name']} ({task['metric']})", *sides, ""]
    for before, after in zip(r["report"]["tuned"], r["report"]["repaired"], strict=True):
        scores = [schema.estimate(e) for e in (after["before"], before["after"], after["after"])]
        words = schema.ability_status(after).word.lower()
        yield [after["name"], *scores, f"{share(after['retention'])}, {words}"]


def share(ratio: Any) -> str:
    if not schema.has(ratio):
        return "-"
    span = schema.percent_interval(ratio)
    return schema.percent(ratio["value"]) + (f" ({span})" if span else "")


def _dots(r: Part, name: str) -> list[dict[str, Any]]:
    looked = max(len(p["parts"]) for p in r["points"])
    return [
        {
            "name": p["label"] if p["label"] in (r["chosen"]["label"], "base", "tuned model") else "",
            "task": p["task"],
            "kept": p["kept"].get(name),
            "highlight": p["label"] == r["chosen"]["label"],
        }
        for p in r["points"]
        if len(p["parts"]) == looked
    ]


def md_table(head: Sequence[str], rows: Any) -> list[str]:
    line = [f"| {' | '.join(head)} |", "|:--|" + "--:|" * (len(head) - 1)]
    return [*line, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def html_table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html(v)}</{tag}>" for v in values)

    body = "".join(f"<tr{' class=chosen' if chosen else ''}>{cells('td', row)}</tr>" for row, chosen in rows)
    return f"<div class=wide><table><tr>{cells('th', head)}</tr>{body}</table></div>"
