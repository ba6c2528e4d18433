"""An order of the task's rows in which each of its sets has the share that its weight says."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from holdfast.data.mix import Order, names_of
from holdfast.data.shares import TASK, quotas, title
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError


def weighted(weights: Mapping[str, float]) -> Order:
    """An order in which each set has its share of every round, whatever its size, and nearly so of every part of one.

    A round has as many rows as there are. Each set is gone through in shuffled rounds of its own, from one round of
    the task into the next: a small set comes several times in one, a large one needs several for all its rows.

    Args:
        weights: by `TokenRow.source`.
    """

    def order(rows: Sequence[TokenRow], seed: int, turn: int) -> list[int]:
        groups = _places(names_of(rows))
        if missing := next((name for name in weights if name not in groups), None):
            what = f"No row of the set {title(missing)!r} is left to train on, and it has a weight."
            raise PlanError(what, "Make the filters of the plan milder, or take the set out of data.train.")
        given = quotas({name: weights[name] for name in groups}, len(rows), "The number of rows")
        rng, placed = random.Random(f"{seed}/{TASK}/{turn}"), list[tuple[float, int]]()
        for name, count in given.items():
            rows_of = _run(groups[name], turn * count, count, f"{seed}/{name}")
            placed += [((n + rng.random()) / count, i) for n, i in enumerate(rows_of)]
        return [i for _, i in sorted(placed)]

    return order


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """Where each name stands."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return found


def _run(items: Sequence[int], start: int, count: int, key: str) -> list[int]:
    """`count` items from the `start`-th on, of the items shuffled again and again."""
    out: list[int] = []
    while len(out) < count:
        turn, at = divmod(start + len(out), len(items))
        order = list(items)
        random.Random(f"{key}/{turn}").shuffle(order)
        out += order[at : at + count - len(out)]
    return out
