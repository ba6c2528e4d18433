"""The instructions suite: does the model still do as it is told, where code can see it?

Each request asks for a form (a length, a shape, words, a language, an order, a case) in an answer about an everyday
subject; an item scores 1 when all its checks (measure/verify.py) hold for the greedy answer, else 0. In the spirit of
IFEval (Zhou et al. 2023, arXiv 2311.07911), with own requests short enough for small models. Whether the answer is
good beyond its form is not judged.

Of each task 14 requests were written by hand and 46 made from templates (tools/make_items.py). The default asks 6,
since writing answers costs the most; `limit` 54 shows a loss of 5 points (benchmarks/suite_power.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.in_context import shuffled
from holdfast.measure.verify import floor, in_words, judge_of

DATA = Path(__file__).parent / "data"
LIMIT = 6  # of each task: 36 answers, some ten seconds of a small model on two cores
MADE = "made"
MAX_TOKENS = 40


def read_data(name: str) -> dict[str, Any]:
    """One data file: "version", "about" and what was written by hand, as "tasks": {task: [{"request", "checks"}]}.

    What tools/make_items.py made beside it stands under "made".
    """
    read = {part: json.loads((DATA / f"{part}.json").read_text(encoding="utf-8")) for part in (name, f"{name}_{MADE}")}
    return {**read[name], MADE: read[f"{name}_{MADE}"][MADE]}


def in_turn(key: str, written: Sequence[Any], made: Sequence[Any]) -> list[Any]:
    """All items in the order in which they are asked: those written by hand, shuffled by `key`, then the made ones."""
    return shuffled(key, written) + shuffled(key, made)


def groups_of(data: dict[str, Any]) -> tuple[Group, ...]:
    """The tasks of a data file; the chance of each is what the best constant answer scores on all its requests."""
    return tuple(
        Group(task, data["version"], round(floor([r["checks"] for r in (*rows, *data[MADE][task])]), 4), "obeyed")
        for task, rows in data["tasks"].items()
    )


def probes_of_task(ask: Ask, task: str, data: dict[str, Any], limit: int, max_tokens: int) -> list[Probe]:
    """The first `limit` requests of a task, shuffled by `ask.seed`."""
    rows = in_turn(f"{task}/{ask.seed}", data["tasks"][task], data[MADE][task])
    return [
        Probe(
            task,
            f"{task}/{n}",
            "generate",
            ask.chat(row["request"]),
            judge=judge_of(row["checks"], row["request"]),
            expected=in_words(row["checks"]),
            max_tokens=max_tokens,
        )
        for n, row in enumerate(rows[:limit])
    ]


def build_suite(ask: Ask) -> Suite:
    """Requests that code can check."""
    data, limit = read_data("instructions"), ask.limit or LIMIT
    probes = [p for task in data["tasks"] for p in probes_of_task(ask, task, data, limit, MAX_TOKENS)]
    settings = {"limit": limit, "seed": ask.seed, "data_version": data["version"]}
    return Suite("instructions", groups_of(data), tuple(probes), settings)
