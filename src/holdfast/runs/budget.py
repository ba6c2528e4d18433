"""Whether a run takes back what breaks a bound (`measure.budget`), and which bounds hold it.

Without a word in the recipe it does, wherever something can be taken back or healed and the items can be cut into a
half that chooses and one that is reported. Then what `measure.keep` names is held at its share, with a standard error
to spare, and every other suite at KEEP_FRAC where a loss below it is shown: a suite of few items would otherwise stop
one run in three by chance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from holdfast import models
from holdfast.errors import HoldfastError
from holdfast.recipe import KEEP_FRAC, Recipe
from holdfast.runs.change import base_tensors
from holdfast.runs.halves import FEWEST_ROWS, halves_of
from holdfast.runs.repair_heal import FEWEST
from holdfast.runs.repair_search import losses_of, margins_of
from holdfast.runs.work import Job


def why_none(job: Job) -> str:
    """Why this run has no budget, "" where it has one; what the recipe says counts."""
    m = job.recipe.measure
    if m.budget is not None:
        return "" if m.budget else "measure.budget is false"
    if job.run.halved:
        return "a comparison shows each plan as it is"
    if m.skip_before:
        return "the base is not measured"
    if not job.suites:
        return "no ability is measured"
    if job.replaces:
        return "new modules in the model's place cannot be taken back"
    if any(p.trains_prompt for p in job.session.plan.active):
        return "a soft prompt cannot be taken back"
    if any(getattr(m, "use_dora", False) for m in job.session.methods) and (why := why_unhealed(job, None)):
        return f"DoRA is more than a scale of its change, and the run cannot be healed: {why}"
    return _uncut(job)


def why_unhealed(job: Job, soft: Any) -> str:
    """Why a run cannot be healed, "" if it can."""
    if soft is not None:
        return "its soft prompt stands outside of the weights"
    confined = next((m.name for m in job.session.methods if m.confined), None)
    if confined:
        return f"{confined} promises which weights or directions stay as they are"
    if models.is_packed(job.model):
        return "its base has packed weights"
    return "" if len(job.task.token_rows) >= FEWEST else f"it has fewer than {FEWEST} rows"


def _uncut(job: Job) -> str:
    """Why nothing could be chosen with, or walked back to."""
    try:
        base_tensors(job.source, job.session)
        few = min(map(len, halves_of(job).rows.values())) < FEWEST_ROWS
        there = bool(halves_of(job).suites)
    except HoldfastError as error:
        return str(error.what).rstrip(".")
    return "there are too few rows to choose with some and report on others" if few or not there else ""


def asked_to_keep(recipe: Recipe) -> Collection[str]:
    """The abilities with a floor that the recipe itself wrote."""
    return recipe.measure.keep or ()


def named(job: Job) -> Mapping[str, float]:
    """The floors that are held with a standard error to spare."""
    return job.recipe.measure.floors


def others(job: Job) -> list[str]:
    """The suites that are held at KEEP_FRAC though no one named them."""
    return [name for name in job.suites if name not in named(job)]


def margin(job: Job, kept: Mapping[str, Mapping[str, float]], spare: bool = True) -> float:
    """How far the ability that is nearest to its floor lies above it; what the base does not have is not in `kept`.

    spare: less a standard error (`repair_search.sure`).
    """
    return min([*margins_of(kept, named(job), spare), *losses_of(kept, named(job))], default=0.0)


def words(job: Job) -> str:
    """What must stay, before anything is trained."""
    if job.unheld:
        return unheld(job)
    return f"Must stay: {bounds(named(job), others(job))}"


def unheld(job: Job) -> str:
    """That nothing is held, and why."""
    return f"Nothing is held: {job.unheld}"


def unasked(job: Job) -> str:
    """That nothing is held, where nobody said so; else ""."""
    m = job.recipe.measure
    said = m.budget is False or m.skip_before or not m.suites or job.run.halved
    return "" if said or not job.unheld else unheld(job)


def bounds(floors: Mapping[str, float], beside: Sequence[str]) -> str:
    """Floors in words, and the suites that no one named."""
    more = [f"no shown loss below {KEEP_FRAC:g} of {', '.join(beside)}"] if beside else []
    return ", ".join([*(f"{name} {floor:g}" for name, floor in floors.items()), *more])


def floors_of(job: Job) -> dict[str, Any]:
    """For the report: the floors, and the suites that are held beside them."""
    return {"floors": dict(named(job)), "others": others(job)}
