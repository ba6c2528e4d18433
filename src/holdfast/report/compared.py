"""The outcome of a comparison: a table for the terminal, Markdown, and a page with the frontier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import escape as html
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdfast.errors import HoldfastError
from holdfast.files import safe_name, write_text

from . import schema
from .markdown import escape
from .plots import save_png, tradeoff_svg
from .repair import STYLE, html_table, md_table, share
from .terminal import TONES

Part = Mapping[str, Any]
EARLY = ("first norm", "first loss")
SIGNS = (
    "First norm and loss: means over the first 100 steps, of the gradient before clipping and the task's loss; they "
    "chose nothing. Of runs with one plan those of lower norm and higher loss came out better in arXiv 2412.13337."
)
CHOSE = "All of this is made on the items for choosing, which the table and the pictures above do not share."
TRIALS = "A dot is a trial, named by its plan and its rate; the chosen one of each plan is bold."
ALONE = "Nothing: every plan was tried at one rate and one strength, so no item was spent on choosing."
NAMED = 16  # ours: of more trials only the chosen ones are named, for the names would hide the dots
AREA = (
    "Area, on {items}: what a plan's trials dominate of task gain times ability kept, 0 to 1. The "
    "largest gain of any trial counts as 1, so luck among the trials is in it, and it ranks nothing."
)
DOTS = (
    "A dot is a plan at its chosen settings, on items that chose nothing; the table's first is bold. Point at one to "
    "see its numbers."
)
FAILED = "These runs failed; the same command tries them again:"


def show(report: Part, console: Console) -> None:
    """Print the ranked table, the advice, and what failed."""
    r = schema.clean(dict(report))
    table = Table(*_head(r), box=box.SIMPLE_HEAD, header_style="dim")
    for row, cells in zip([None, *r["rows"]], _cells(r), strict=True):
        table.add_row(*map(Text, cells), style=TONES.get(row["status"], "") if row else "dim")
    console.print(table)
    console.print(schema.one_line(r["advice"]), markup=False, highlight=False)
    if r["failed"]:
        console.print(FAILED, style="bold")
    for label, words in r["failed"].items():
        console.print(f"  {label}: {schema.one_line(words)}", markup=False, highlight=False)


def markdown(report: Part) -> str:
    """The same as Markdown. Intervals are of 95 %."""
    r = schema.clean(dict(report))
    lines = [f"### {escape(r['task']['name'])}", "", escape(r["advice"]), ""]
    lines += md_table(list(map(escape, _head(r))), [list(map(escape, cells)) for cells in _cells(r)])
    if r["failed"]:
        lines += [FAILED, "", *(f"- {escape(k)}: {escape(v)}" for k, v in r["failed"].items()), ""]
    lines.append(f"<sub>{escape(_foot(r))}</sub>")
    return "\n".join(lines) + "\n"


def _pictures(r: Part) -> dict[str, str]:
    """ability with a floor -> the frontier as an SVG file."""
    return {name: tradeoff_svg(_dots(r, name), _axis(r), f"{name} kept") for name in r["keep"]}


def _axis(r: Part) -> str:
    return f"{r['task']['metric']} (lower is better)" if r["task"].get("lower") else r["task"]["metric"]


def write(report: Part, out: Path) -> None:
    """compare.md, compare.html, and the frontiers as compare.<ability>.svg, and .png where matplotlib works."""
    r = schema.clean(dict(report))
    drawn = _pictures(r)
    write_text(out / "compare.md", markdown(report))
    write_text(out / "compare.html", _page(r, drawn))
    for name, svg in drawn.items():
        write_text(out / f"compare.{safe_name(name)}.svg", svg)
    with suppress(HoldfastError):  # it is not there, or cannot be imported
        for name in r["keep"]:
            save_png(_dots(r, name), out / f"compare.{safe_name(name)}.png", _axis(r), f"{name} kept")


def page(report: Part) -> str:
    """The same as one HTML file without scripts, with a picture of the frontier for each ability with a floor."""
    r = schema.clean(dict(report))
    return _page(r, _pictures(r))


def _page(r: Part, drawn: Mapping[str, str]) -> str:
    failed = "".join(f"<li>{html(k)}: {html(v)}</li>" for k, v in r["failed"].items())
    body = [
        f"<h1>{html(r['task']['name'])}</h1><p>{html(r['advice'])}</p>",
        html_table(_head(r), [(cells, False) for cells in _cells(r)]),
        *(f"<h2>{html(name)}</h2>{svg}" for name, svg in drawn.items()),
        f"<p>{DOTS}</p>",
        *(_chose(r) if [*_trials(r)] else [f"<h2>What chose</h2><p>{html(ALONE)}</p>"]),
        f"<p>{html(_areas(r))}</p>",
        f"<p>{html(FAILED)}</p><ul>{failed}</ul>" if failed else "",
        f"<p>{html(_foot(r))}</p>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    start = f'<!doctype html><html lang="en"><head>{head}<title>Comparison</title></head>'
    return f"{start}<body>{''.join(body)}</body></html>\n"


def _chose(r: Part) -> Iterator[str]:
    """The trials, and what they say."""
    yield f"<h2>What chose {'rates and strengths' if _strengths(r) else 'the learning rates'}</h2><p>{html(CHOSE)}</p>"
    head = ["plan", "learning rate", *(["strength"] if _strengths(r) else []), *EARLY, "task", *r["keep"]]
    yield html_table(head, [(cells, False) for cells in _trials(r)])
    yield from _trial_pictures(r)
    yield f"<p>{html(TRIALS)}</p>" if r["keep"] else ""
    yield f"<p>{html(SIGNS)}</p>"


def _head(r: Part) -> list[str]:
    settings = ["rate", "strength"] if _strengths(r) else ["rate"]
    return [
        "plan",
        r["task"]["metric"],
        *(f"{n} kept" for n in _abilities(r)),
        "verdict",
        *(["seeds"] if _missing(r) else []),
        *settings,
        "seconds",
    ]


def _missing(r: Part) -> bool:
    """Whether some plan did not come through with all its seeds."""
    return any(len(row["seeds"]) < r["seeds"] for row in r["rows"])


def _strengths(r: Part) -> bool:
    """Whether some plan was tried at another strength than its own."""
    return any(trial.get("strength", 1) != 1 for row in r["rows"] for trial in row["trials"])


def _abilities(r: Part) -> list[str]:
    return list(dict.fromkeys(a["name"] for row in r["rows"] for a in row["abilities"])) or list(r["keep"])


def _cells(r: Part) -> Iterator[list[str]]:
    """The base, then every plan, the best first."""
    names = _abilities(r)
    yield ["base", schema.estimate(r["task"]["base"]), *("" for _ in _head(r)[2:])]
    for row in r["rows"]:
        kept = {a["name"]: share(a["retention"]) for a in row["abilities"]}
        seeds = [f"{len(row['seeds'])} of {r['seeds']}"] if _missing(r) else []
        cost = [*_settings(r, row), f"{row['seconds']:.0f}"]
        words = schema.ability_status({"status": row["status"]}).word.lower()
        yield [row["name"], schema.estimate(row["task"]), *(kept.get(n, "-") for n in names), words, *seeds, *cost]


def _trials(r: Part) -> Iterator[list[str]]:
    for row in r["rows"]:
        for trial in row["trials"]:
            kept = [share(trial["kept"].get(name)) for name in r["keep"]]
            signs = trial.get("early") or {}
            first = ["-" if signs.get(name) is None else f"{signs[name]:.3g}" for name in ("grad_norm", "loss")]
            yield [row["name"], *_settings(r, trial), *first, schema.estimate(trial["task"]), *kept]


def _settings(r: Part, of: Part) -> list[str]:
    """The learning rate of a row or a trial, and by how much its strength was multiplied where that differs."""
    strength = [f"{of.get('strength', 1):.3g}"] if _strengths(r) else []
    return [f"{of['learning_rate']:.2g}", *strength]


def _trial_pictures(r: Part) -> Iterator[str]:
    """Of each ability with a floor, all trials on the items for choosing; in a picture of their own."""
    for name in r["keep"]:
        dots = _trial_dots(r, name)
        if any(schema.has(dot["kept"]) for dot in dots):
            yield f"<h3>{html(name)}, on the items for choosing</h3>"
            yield tradeoff_svg(dots, _axis(r), f"{name} kept, on the items for choosing")


def _trial_dots(r: Part, name: str) -> list[dict[str, Any]]:
    pairs = [(row, trial) for row in r["rows"] for trial in row["trials"]]
    dots = []
    for row, trial in pairs:
        chosen = _settings(r, trial) == _settings(r, row)
        at = f"{row['name']} {' x'.join(_settings(r, trial))}" if len(pairs) <= NAMED else ""
        kept = trial["kept"].get(name)
        dots.append({"name": row["name"] if chosen else at, "task": trial["task"], "kept": kept, "highlight": chosen})
    return dots


def _areas(r: Part) -> str:
    items = "the items for choosing" if [*_trials(r)] else "what is reported"
    each = ", ".join(f"{row['name']} {row['hypervolume']:.2f}" for row in r["rows"])
    return f"{AREA.format(items=items)} {each}."


def _dots(r: Part, name: str) -> list[dict[str, Any]]:
    return [
        {"name": row["name"], "task": row["task"], "kept": a["retention"], "highlight": row is r["rows"][0]}
        for row in r["rows"]
        for a in row["abilities"]
        if a["name"] == name
    ]


def _foot(r: Part) -> str:
    seeds, fewer = r["seeds"], ", or as many as the table says" if _missing(r) else ""
    runs = (
        f"{seeds} seeds each{fewer}: a verdict about the plan"
        if seeds > 1
        else "one seed each: a verdict about these weights"
    )
    return f"Holdfast {r['holdfast_version']}; {r['task']['split']} rows, {runs}; in brackets: 95 % intervals."
