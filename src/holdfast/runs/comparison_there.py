"""A comparison whose runs are done on a cluster: this process waits for each, and finds it in its folder.

So what is chosen, reported and removed is decided as ever, and by nobody else. All trials are handed out at the start,
or each plan's search as one task, since its next trial follows from those before; the seeds once the settings are
chosen. The check of the plans and the measurement of the base are the first task.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.measure.parts import REPORT
from holdfast.runs.bases import Bases
from holdfast.runs.cluster import Cluster
from holdfast.runs.comparison import Comparison, Wish
from holdfast.runs.contestants import Cell
from holdfast.runs.halves import CHOOSE, Measured
from holdfast.runs.run import Run, Tell


class ComparisonThere(Comparison):
    """One comparison at work on a cluster; to be closed."""

    def __init__(self, wish: Wish, base_dir: Path, out: Path, tell: Tell):
        super().__init__(wish, base_dir, out, tell)
        self.cluster = Cluster(len(self.plans) * (1 if wish.search else wish.trials))

    def begin(self) -> None:
        """Check and measure somewhere, and hand out the first phase."""
        self.tell("check", 0.0, "on the cluster")
        self.cluster.submit("start", _start, self._place())
        self.rates, self.suites = self.cluster.result("start")
        for name in self.plans if CHOOSE in self.wish.halves else ():
            if self.wish.search:
                self.cluster.submit(name, _search, self._place(), name)
            else:
                for cell in self.trials(name).cells:
                    self.cluster.submit((cell, CHOOSE), _run, self._place(), cell, CHOOSE)

    def pick(self, name: str) -> tuple[list[Any], Cell | None]:
        """As ever, when the plan's search is over."""
        try:
            self._take(name, f"{name}: search")
        except HoldfastError as e:
            self.failed[f"{name}: search"] = str(e)
            return [], None
        return super().pick(name)

    def before_report(self, chosen: Sequence[Cell]) -> None:
        """Hand out the second phase."""
        for cell in (one for plan in chosen for one in self.seeds(plan)):
            self.cluster.submit((cell, REPORT), _run, self._place(), cell, REPORT)

    def before(self, cell: Cell, half: str) -> None:
        """Wait for a run."""
        self._take((cell, half), cell.label)
        if cell.label in self.failed:
            raise HoldfastError(self.failed[cell.label])

    def ask(self, run: Run, half: str) -> Measured:
        """Nothing is trained or measured here."""
        what = f"The run {run.path} was done on the cluster, and this machine does not see it."
        raise HoldfastError(what, "Choose an --out that all machines of the cluster share.")

    def _take(self, name: Any, words: str) -> None:
        """Wait for a task, if there is one, and take what failed in it."""
        if self.cluster.has(name):
            self.tell("compare", self.share_done, words)
            self.failed |= self.cluster.result(name)

    def _place(self) -> _Place:
        return _Place(self.wish, self.base_dir, self.folder.path, self.rates, self.suites, os.getcwd())


# ---- what a worker does


@dataclass(frozen=True)
class _Place:
    """What a worker is told of a comparison."""

    wish: Wish
    base_dir: Path
    out: Path
    rates: dict[str, float]
    suites: tuple[str, ...]
    cwd: str

    def comparison(self) -> Comparison:
        """Its own, with what the driver knows."""
        if not self.out.is_absolute():  # and so are the paths that the runs there have written down
            os.chdir(self.cwd)
        found = Comparison(self.wish, self.base_dir, self.out, bases=_bases())
        found.rates, found.suites = dict(self.rates), self.suites
        return found


@cache
def _bases() -> Bases:
    """Of this worker, which does one run after the other."""
    return Bases()


def _start(place: _Place) -> tuple[dict[str, float], tuple[str, ...]]:
    comparison = place.comparison()
    comparison.begin()
    return comparison.rates, comparison.suites


def _run(place: _Place, cell: Cell, half: str) -> dict[str, str]:
    comparison = place.comparison()
    comparison.attempt(cell, half)
    return comparison.failed


def _search(place: _Place, name: str) -> dict[str, str]:
    comparison = place.comparison()
    comparison.pick(name)
    return comparison.failed
