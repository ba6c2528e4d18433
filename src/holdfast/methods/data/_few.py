"""Of many rows a few: drawn by the run's seed, never the first ones of a file; or in turn, step after step."""

import random
from collections.abc import Sequence
from typing import TypeVar

from holdfast.services import Context

T = TypeVar("T")


def few(rows: Sequence[T], most: int | None, name: str, ctx: Context) -> Sequence[T]:
    """At most `most` of the rows, in their order; no other one is read. None, or no more of them: all."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[i] for i in sorted(random.Random(f"{name}/{ctx.seed}").sample(range(len(rows)), most))]


def asked_about(rows: Sequence[T], most: int | None, name: str, ctx: Context, rest: str) -> Sequence[T]:
    """`few`, of which the base is asked; a note of the run says how many there are and what becomes of the `rest`."""
    chosen = few(rows, most, name, ctx)
    if len(chosen) < len(rows):
        ctx.notes.append(f"{name} asks the base about {len(chosen)} of {len(rows)} rows; {rest}")
    return chosen


def in_turn(step: int, each: int, pool: int) -> list[int]:
    """Places of the `each` rows of a step in a pool that is gone through again and again."""
    return [(step * each + i) % pool for i in range(each if pool else 0)]
