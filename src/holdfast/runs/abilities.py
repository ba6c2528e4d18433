"""Which abilities a run measures where its recipe leaves that open (`measure.suites: [auto]`).

All default suites, where measuring them twice costs less than a tenth of the training; else in-context learning alone,
and where the data goes through the chat template instructions too: a plan that keeps all of in-context learning on
conversations can lose every instruction, which are prompts of just that form (docs/budget.md).
A suite with a floor in `measure.keep` is measured in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.measure.names import DEFAULT, names_of
from holdfast.measure.probe import Ask
from holdfast.measure.suites import build, check_suite
from holdfast.recipe import AUTO, Recipe

SHARE = 0.1  # ours
CHAT = "instructions"
CHARACTERS = 4  # of a token, about
WRITTEN = 8  # ours: a new token of a generated answer in tokens that are read
STEP = 3  # forwards' worth of a training step: one, and a backward of two
LOOKED = 256  # rows whose length is taken


def certain(recipe: Recipe) -> tuple[str, ...]:
    """The suites that are measured whatever the training costs."""
    m = recipe.measure
    if AUTO not in m.suites:
        return names_of(m.suites)
    return names_of(["in-context", *(s for s in m.suites if s != AUTO), *m.floors])


def measured_suites(
    recipe: Recipe, rows: Sequence[Any], steps: int, ask: Ask, longest: int, chat: bool = False
) -> tuple[str, ...]:
    """The suites of a run of so many steps on these token rows; of the open ones those that the model can read.

    chat: whether the rows are written by the chat template.
    """
    names = certain(recipe)
    if AUTO not in recipe.measure.suites:
        return names
    cheap = 2 * cost(ask) <= SHARE * STEP * _tokens(recipe, rows, steps)
    more = [*([CHAT] if chat else []), *(DEFAULT if cheap else ())]
    return tuple(dict.fromkeys([*names, *(s for s in more if _fits(s, ask, longest))]))


def words(recipe: Recipe, names: Sequence[str]) -> str:
    """Why these are measured, where the recipe left it open; else ""."""
    if AUTO not in recipe.measure.suites:
        return ""
    if set(DEFAULT) <= set(names):
        return "all default suites are measured, which costs less than a tenth of the training"
    left = ", ".join(s for s in DEFAULT if s not in names)
    return f"not measured, as it would cost more than a tenth of the training or does not fit the model: {left}"


def cost(ask: Ask) -> float:
    """What all default suites take at most, in tokens of a forward: each text once, answers as long as they may be."""
    probes = [p for name in DEFAULT for p in build(name, ask).probes]
    read = sum(map(len, {p.context for p in probes})) + sum(len(a) for p in probes for a in p.answers)
    return read / CHARACTERS + WRITTEN * sum(p.max_tokens for p in probes if p.kind == "generate")


def _tokens(recipe: Recipe, rows: Sequence[Any], steps: int) -> float:
    """What is trained on."""
    t = recipe.training
    looked = [len(r.ids) for r in islice(iter(rows), LOOKED)]
    each = sum(looked) / max(1, len(looked))
    return steps * t.per_device_train_batch_size * t.gradient_accumulation_steps * each


def _fits(name: str, ask: Ask, longest: int) -> bool:
    try:
        check_suite(name, ask, longest)
    except HoldfastError:
        return False
    return True
