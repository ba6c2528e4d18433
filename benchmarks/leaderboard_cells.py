"""The cells of the leaderboard: their files, which are missing, and which learning rate a method is shown at.

A cell is one training, measured: a file of a few kilobytes in results/leaderboard/, one line a figure, scores of items
packed. What was measured before rates were chosen lies in its folder `before`.

A rate is chosen on validation rows alone, cut off the training rows: the best share of right answers with the first
seed, the lower rate of equal ones. The choice is written down with a hash of all that decides a run (chosen.json)
before the cells that only it has (further seeds, other tasks) are trained, and is not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from holdfast.files import content_key, read_json, safe_name, write_text
from holdfast.measure.packed import pack, unpack
from leaderboard_plans import BATCH, CHOOSES, FIRST, SECOND, SHARED, STEPS, WIDE, rates

BASE, BEFORE = "base", "before"
CHOSEN, FAILED = "chosen.json", "failed.json"
SEEDS, WIDE_SEEDS = 2, 3
MODEL = "smollm2-135m"
DIVERGED = r"not finite|\bnan\b"  # in an error: no other try would end otherwise
Scores = Mapping[str, Sequence[float]]  # of a task of a suite, item by item
Data = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training. rate: None for the base, and where it is not chosen yet."""

    task: str
    method: str
    rate: float | None = None
    seed: int = 0

    @property
    def file(self) -> str:
        """Its path in the folder."""
        if self.method == BASE:
            return f"{self.task}/{BASE}.json"
        return f"{self.task}/{safe_name(self.method)}.{self.rate:g}.{self.seed}.json"

    def __str__(self) -> str:
        rate = "" if self.rate is None else f" at {self.rate:g}"
        return f"{self.task}, {self.method}{rate}" + ("" if self.method == BASE else f", seed {self.seed}")


@dataclass(frozen=True)
class Entry:
    """A method of the plans: what trains, in words that decide the run; its learning rate there; whether it trains an
    adapter and none of the model's own weights."""

    words: str
    rate: float
    adapter: bool = False


# ---- files


def packed(scores: Sequence[float]) -> Any:
    """Scores of items as a string of digits if all are 0 or 1, else as numbers of four digits."""
    rounded = [round(x, 4) if isinstance(x, float) and x % 1 else int(x) for x in scores]
    return pack([{"correct": x} for x in rounded], [{}] * len(rounded)).get("correct", [])


def unpacked(scores: Any) -> list[float]:
    return [i["correct"] for i in unpack({"correct": scores}, [{}] * len(scores))]


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that it can be read: a line for every figure, and for all scores of a suite."""
    lines = [f" {json.dumps(key)}: {_value(value)}" for key, value in record.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _value(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
    return json.dumps(value)


def scores_of(record: Mapping[str, Any], what: str) -> dict[str, list[float]]:
    """Item scores of a suite of a record: {task: scores}; {} where it was not measured."""
    return {name: unpacked(x) for name, x in record["suites"].get(what, {}).items()}


def options(doc: str | None, shows: str, folder: Path, shared: str) -> argparse.ArgumentParser:
    """What every bench that does its runs in turn is asked: what to do, with which data, where, and for how long.

    shows: the word beside "run". shared: what lies in the folder of data, which is not shipped.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", shows))
    parser.add_argument("--shared", type=Path, default=SHARED, help=f"a folder with {shared}")
    parser.add_argument("--folder", type=Path, default=folder, help="of the runs")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--minutes", type=float, default=None, help="start no run after so many")
    return parser


def clock_after(minutes: float | None) -> float:
    """What `time.monotonic` shows in so many minutes; None: never."""
    return float("inf") if minutes is None else time.monotonic() + 60 * minutes


def in_turn(todo: Iterable[tuple[str, Path, Callable[[], Data]]], until: float) -> dict[str, str]:
    """Make and save records one after the other until the clock shows `until`; returns what failed and why.

    todo: what a record is called, its file, and what makes it.
    """
    failed: dict[str, str] = {}
    for name, path, make in todo:
        if time.monotonic() > until:
            break
        begun = time.monotonic()
        try:
            save(path, make())
        except Exception as e:  # one broken run must not end the others
            failed[name] = f"{type(e).__name__}: {e}"
        how = failed.get(name, "measured")
        print(f"{time.strftime('%H:%M:%S')} {name}: {how}, {time.monotonic() - begun:.0f} s", flush=True)
    return failed


# ---- the board


class Board:
    """What is there, what is missing, and in which order."""

    def __init__(self, folder: Path, methods: Mapping[str, Entry]):
        self.folder, self.methods = folder, dict(methods)
        self.failed: dict[str, str] = read_json(folder / FAILED)
        self.before = set(self.failed)  # what had failed before this run
        self.tried: set[Cell] = set()  # failed in this run: not tried again by it
        self.given_up: set[Cell] = set()  # of those what failed twice or diverged: a full disk says nothing of a rate

    def read(self, cell: Cell) -> Data | None:
        """The record of a cell."""
        path = self.folder / cell.file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def has(self, cell: Cell) -> bool:
        return (self.folder / cell.file).is_file()

    def records(self, before: bool = False) -> list[Data]:
        """All cells of the folder, or what was measured before."""
        folder = self.folder / BEFORE if before else self.folder
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))]

    # ---- the choice

    def chosen(self, name: str) -> float | None:
        """The rate of a method, chosen and written down when all its rates were tried; None before."""
        known = read_json(self.folder / CHOSEN)
        if name in known:
            return known[name]["rate"]
        cells = [Cell(CHOOSES, name, rate) for rate in self.rates(name)]
        found = {c.rate: r["figures"]["validation"] for c in cells if (r := self.read(c)) and self.is_current(r)}
        if not found or any(not self.has(c) and c not in self.given_up for c in cells):
            return None
        rate = best_rate(found)
        validation = {f"{r:g}": x for r, x in found.items()}
        sha = content_key(self.methods[name].words, rate, STEPS, BATCH)
        save(self.folder / CHOSEN, {**known, name: {"rate": rate, "validation": validation, "sha": sha}})
        return rate

    def rates(self, name: str) -> tuple[float, ...]:
        return rates(self.methods[name].rate)

    # ---- what is to do

    @cached_property
    def order(self) -> list[str]:
        """Names of methods: those that all are compared with first."""
        return sorted(self.methods, key=lambda n: FIRST.index(n) if n in FIRST else len(FIRST))

    def wanted(
        self, only: Sequence[str] = (), best: Sequence[str] = (), wide_first: bool = False, own_first: bool = False
    ) -> list[Cell]:
        """All cells in the order of need; those whose rate is not chosen yet have none.

        only: these methods alone. best: methods that are measured on all tasks. wide_first: those cells before others.
        own_first: every method at its own rate before others.
        """
        names = [n for n in self.order if n in only or not only]
        many = [cell for name in names for cell in self._of(name)]
        wide = [
            Cell(task, name, self.chosen(name), seed)
            for name in names
            for task in WIDE
            for seed in range(WIDE_SEEDS)
            if name in best
        ]
        bases = [Cell(task, BASE) for task in (CHOOSES, SECOND, *(WIDE if wide else ()))]
        own = [Cell(CHOOSES, name, self.methods[name].rate) for name in names] if own_first else []
        many = list(dict.fromkeys([*own, *many]))
        return [*bases, *wide, *many] if wide_first else [*bases, *many, *wide]

    def _of(self, name: str) -> Iterator[Cell]:
        rate = self.chosen(name)
        yield from (Cell(CHOOSES, name, r) for r in self.rates(name))
        yield from (Cell(CHOOSES, name, rate, seed) for seed in range(1, SEEDS))
        yield from (Cell(SECOND, name, rate, seed) for seed in range(SEEDS))

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those that were not measured, and have not failed in this run."""
        return [c for c in cells if (c.method != BASE and c.rate is None) or (not self.has(c) and c not in self.tried)]

    def ready(self, cells: Sequence[Cell], busy: Sequence[Cell]) -> Cell | None:
        """The first missing cell that can be run now: its rate is known, and its base was measured."""
        for cell in self.missing(cells):
            known = cell.method == BASE or (cell.rate is not None and self.has(Cell(cell.task, BASE)))
            if known and cell not in busy:
                return cell
        return None

    def note(self, cell: Cell, error: str | None) -> None:
        """Remember how a cell ended; what failed is tried again by the next run."""
        before = dict(self.failed)
        if error is None:
            self.failed.pop(str(cell), None)
        else:
            self.failed[str(cell)] = error
            self.tried.add(cell)
            if str(cell) in self.before or re.search(DIVERGED, error.lower()):
                self.given_up.add(cell)
        if self.failed != before:
            save(self.folder / FAILED, self.failed)

    def changed(self) -> list[str]:
        """Methods with cells of another plan than theirs is now."""
        known = [r for r in self.records() if r["method"] in self.methods]
        return list(dict.fromkeys(r["method"] for r in known if not self.is_current(r)))

    def is_current(self, record: Data) -> bool:
        """Whether a cell is of the plan that its method has now."""
        words = self.methods[record["method"]].words
        return record.get("plan", words) == words

    def models(self) -> set[str]:
        """The models that the cells are of; those that do not say it are of the first."""
        return {r.get("model", MODEL) for r in self.records()}

    def seconds(self, cells: Sequence[Cell]) -> float | None:
        """How long cells take on one worker, by the times measured so far: of the method and task, else of the task,
        else of all; None without any."""
        times = [(r["task"], r["method"], r["cost"]["seconds"]) for r in self.records() if r["cost"].get("seconds")]
        total = 0.0
        for cell in cells:
            like = [t for task, method, t in times if (task, method) == (cell.task, cell.method)]
            like = like or [t for task, _, t in times if task == cell.task] or [t for *_, t in times]
            if not like:
                return None
            total += fmean(like)
        return total


def best_rate(validation: Mapping[float | None, float]) -> Any:
    """The rate with the best score on validation rows; of equal ones the lowest."""
    return min(validation, key=lambda rate: (-validation[rate], rate))
