"""A set that is streamed: of what is too large to be fetched whole, the rows that the run will draw, and no more.

They come through a buffer that is drawn from by seed, as far as their order in the source may mean something, and are
kept like the rows of any set. So a run goes on where it stopped, and every method may look at all of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from holdfast.recipe import Recipe, Source

Item = TypeVar("Item")
BUFFER = 10_000  # rows


def rows_wanted(recipe: Recipe, source: Source) -> int | None:
    """How many rows of a training set the run needs, with those cut off for validation; None: it is read whole."""
    if not source.streaming:
        return None
    data, training = recipe.data, recipe.training
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    whole = sum(one.weight or 0 for one in data.sets("train"))
    share = source.weight / whole if source.weight else 1
    drawn = (data.train_size or training.max_steps * step) * share
    return math.ceil(round(drawn + _cut(recipe, drawn, share), 6))


def _cut(recipe: Recipe, drawn: float, share: float) -> float:
    """The most rows of a set that will be cut off for validation; drawn: of it for training; share: of all sets."""
    data = recipe.data
    if data.validation or data.validation_size == 0:
        return 0
    if data.validation_size and data.validation_size >= 1:
        return data.validation_size * share
    part = data.validation_size or 0.1
    cut = drawn * part / (1 - part)
    return cut if data.validation_size or data.test_size is None else min(cut, data.test_size)


def shuffled(items: Iterable[Item], count: int, seed: int) -> Iterator[Item]:
    """`count` items, each drawn from a buffer that the next item fills up again; no more are read than come out."""
    source, rng = iter(items), random.Random(f"{seed}/stream")
    source = islice(source, count)
    held = list(islice(source, BUFFER))
    for item in source:
        at = rng.randrange(len(held))
        yield held[at]
        held[at] = item
    rng.shuffle(held)
    yield from held
