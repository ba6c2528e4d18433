"""Which abilities a run measures where its recipe leaves that open (`measure.suites: [auto]`).

All default suites, where measuring them twice costs less than a tenth of the training; else in-context learning alone.
A suite with a floor in `measure.keep` is measured in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.measure.names import DEFAULT, names_of
from holdfast.measure.probe import Ask
from holdfast.measure.suites import check_suite
from holdfast.recipe import AUTO, Recipe

SHARE = 0.1  # ours
COST = 80_000  # tokens' worth of a forward that all default suites take: counted with SmolLM2's tokenizer, a new token
# of a generated answer as eight
STEP = 3  # forwards' worth of a training step: one, and a backward of two
LIMIT, LOOKED = 48, 256  # items of a task that COST was counted with; rows whose length is taken


def certain(recipe: Recipe) -> tuple[str, ...]:
    """The suites that are measured whatever the training costs."""
    m = recipe.measure
    if AUTO not in m.suites:
        return names_of(m.suites)
    return names_of(["in-context", *(s for s in m.suites if s != AUTO), *m.keep])


def measured_suites(recipe: Recipe, rows: Sequence[Any], steps: int, ask: Ask, longest: int) -> tuple[str, ...]:
    """The suites of a run of so many steps on these token rows; of the open ones those that the model can read."""
    names = certain(recipe)
    if AUTO not in recipe.measure.suites or not _cheap(recipe, rows, steps):
        return names
    return tuple(dict.fromkeys([*names, *(s for s in DEFAULT if _fits(s, ask, longest))]))


def words(recipe: Recipe, names: Sequence[str]) -> str:
    """Why these are measured, where the recipe left it open; else ""."""
    if AUTO not in recipe.measure.suites:
        return ""
    if set(DEFAULT) <= set(names):
        return "all default suites are measured, which costs less than a tenth of the training"
    left = ", ".join(s for s in DEFAULT if s not in names)
    return f"not measured, as it would cost more than a tenth of the training or does not fit the model: {left}"


def _cheap(recipe: Recipe, rows: Sequence[Any], steps: int) -> bool:
    t = recipe.training
    looked = [len(r.ids) for r in islice(iter(rows), LOOKED)]
    each = sum(looked) / max(1, len(looked))
    tokens = steps * t.per_device_train_batch_size * t.gradient_accumulation_steps * each
    cost = 2 * COST * (recipe.measure.limit or LIMIT) / LIMIT  # before and after
    return cost <= SHARE * STEP * tokens


def _fits(name: str, ask: Ask, longest: int) -> bool:
    try:
        check_suite(name, ask, longest)
    except HoldfastError:
        return False
    return True
