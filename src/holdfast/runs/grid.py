"""The grid of a comparison: learning rates times strengths, as many trials for a plan without a strength.

A plan is tried at every rate with every strength. One in which no method has a strength is tried at strength 1 alone,
and at further rates between those of the grid, until it has had as many trials: a budget that is not equal would
compare budgets. A grid of one rate has nothing between, so such a plan is then tried once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

from holdfast.errors import PlanError
from holdfast.runs.contestants import Cell, written
from holdfast.runs.repair_search import Point

WORDS = {"--factor": ("learning rate", "0.33"), "--strength": ("strength", "0.3")}


def check_grid(factors: Sequence[float], strengths: Sequence[float]) -> None:
    """Raise PlanError for a grid in which nothing stands, or something twice."""
    for option, values in (("--factor", factors), ("--strength", strengths)):
        name, example = WORDS[option]
        if not values:
            raise PlanError(f"The grid of {name}s is empty.", f"Write {option} 1, for example.")
        bad = next((x for x in values if not 0 < x < float("inf")), None)
        if bad is not None:
            raise PlanError(f"A {name} cannot be multiplied by {bad:g}.", f"Give numbers above 0, such as {example}.")
        if len({written(x) for x in values}) < len(values):
            what = f"The grid of {name}s {list(values)} holds one twice, to three digits."
            raise PlanError(what, f"Name each {option} once.")


class Grid:
    """The trials of a plan, its own settings first; asked as `search.Search`. has: whether the plan has a strength."""

    def __init__(self, plan: str, seed: int, factors: Sequence[float], strengths: Sequence[float], has: bool):
        if has:
            pairs = [(f, s) for s in strengths for f in factors]
        else:
            pairs = [(f, 1.0) for f in finer(factors, len(factors) * len(strengths))]
        ordered = sorted(pairs, key=lambda p: (p[1] != 1, p[1], p[0] != 1, p[0]))
        self.cells = [Cell(plan, f, seed, s) for f, s in ordered]
        self._next = iter(self.cells)

    def ask(self) -> Cell | None:
        """What is tried next; None: nothing is left."""
        return next(self._next, None)

    def tell(self, point: Point | None) -> None:
        """What it scored, which changes nothing here."""


def finer(factors: Sequence[float], num: int) -> list[float]:
    """`num` factors: those given, and in the middle of the widest gap the next one, again and again."""
    found = sorted(factors)
    while len(found) < num and len(found) > 1:
        low, high = max(pairwise(found), key=lambda pair: round(pair[1] / pair[0], 9))  # of equal gaps the lowest
        found = sorted([*found, sqrt(low * high)])
    return found
