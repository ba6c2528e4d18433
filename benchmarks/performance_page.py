"""Writes docs/performance.md from what the performance benchmarks measured.

    python benchmarks/performance_page.py

Sections: speed.py, memory.py, overhead.py, scoring.py, startup.py, growth.py, gpu.py. What has no JSON is
"not measured yet".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import _common as C
import gpu
import growth
import memory
import speed
import startup

NONE = ["Not measured yet."]
INTRO = """# Performance

Produced by `benchmarks/performance_page.py`; do not edit by hand. `make bench` measures what is missing.

Every figure is a ratio of medians, measured against the named peer in turn in one run: same model, rows, order,
learning rate, rows a step and number of steps. "Loss apart" is the mean distance of the two loss curves relative to
their height. Rates count the task's own tokens, no padding; "trained" are those that carry a loss. The matmul rate is
that of the model's own largest layer, measured in the same process; a share of 100 % would be 6 FLOP per parameter and
token at that rate. Absolute figures are those of the machine named below each table.
"""


def hardware(facts: C.Data) -> list[str]:
    """One line: where, and with which versions."""
    v, card = facts["versions"], facts["card"]
    where = f"{card}, " if card else ""
    names = ("torch", "transformers", "peft", "trl", "lm_eval")
    tools = ", ".join(f"{n} {v[n]}" for n in names if n in v)
    return ["", f"{where}{facts['cpu']}, {facts['threads']} of {facts['cores']} threads, {facts['system']}; {tools}."]


def facts_of(path: Path) -> C.Data:
    """Those of a file, or of the newest file of a folder."""
    newest = max(path.glob("*.json"), key=lambda p: p.stat().st_mtime) if path.is_dir() else path
    return json.loads(newest.read_text(encoding="utf-8"))["facts"]


def section(lines: list[str], path: Path) -> list[str]:
    return [*lines, *hardware(facts_of(path))] if lines else NONE


def overhead(path: Path) -> list[str]:
    if not path.is_file():
        return NONE
    d = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for one in d.values():  # of each task
        lines += ["| plan | time, plain tuning of the same kind = 1 |", "|---|---|"]
        lines += [*(f"| {n} | {r:.2f} |" for n, r in one["ratio"].items()), "", one["note"], ""]
    return lines[:-1]


def scoring(path: Path) -> list[str]:
    if not path.is_file():
        return NONE
    d = json.loads(path.read_text(encoding="utf-8"))
    return [
        f"The in-context suite, {d['items']} items, {d['unique_tokens']} unique tokens: {d['seconds']:.1f} s, "
        f"{d['times_the_floor']:.2f} times the floor of its matrix products.",
        "",
        f"{d['machine']}, {d['threads']} threads, torch {d['torch']}. Against lm-evaluation-harness: docs/ruler.md.",
    ]


def page(results: Path, plot: Path) -> str:
    """The whole page; `plot` is shown beside the growth table when it is there."""
    picture = ["", f"![growth]({plot.name})"] if plot.is_file() else []
    grown = growth.table(results / "growth")
    parts = {
        "Training speed": section(speed.table(results / "speed"), results / "speed"),
        "Memory": section(memory.table(results / "memory.json"), results / "memory.json"),
        "What retention costs": overhead(results / "overhead.json"),
        "Scoring": scoring(results / "scoring.json"),
        "Starting": section(startup.table(results / "startup.json"), results / "startup.json"),
        "Growth": section([*grown, *picture] if grown else [], results / "growth"),
        "On a GPU": section(gpu.table(results / "gpu.json"), results / "gpu.json"),
    }
    return "\n".join([INTRO, *(line for title, lines in parts.items() for line in (f"## {title}", "", *lines, ""))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=C.RESULTS)
    parser.add_argument("--out", type=Path, default=C.HERE.parent / "docs" / "performance.md")
    args = parser.parse_args()
    args.out.write_text(page(args.results, args.out.parent / growth.PLOT.name), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
