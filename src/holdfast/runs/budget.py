"""Whether a run takes back what breaks a bound (`measure.budget`), and which bounds hold it.

Without a word in the recipe it does, wherever something can be taken back or healed and the items can be cut into a
half that chooses and one that is reported. Then what `measure.keep` names is held at its share, with a standard error
to spare, and every other suite at KEEP_FRAC where a loss below it is shown: a suite of few items would otherwise stop
one run in three by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.engine.processes import world
from holdfast.errors import HoldfastError
from holdfast.recipe import KEEP_FRAC
from holdfast.runs.repair_search import sure

if TYPE_CHECKING:
    from holdfast.runs.job import Job


def has_budget(job: Job) -> bool:
    """Whether this run has one; what the recipe says counts."""
    m = job.recipe.measure
    if m.budget is not None:
        return m.budget
    if job.run.halved or m.skip_before or not job.suites or not _can_take_back(job):
        return False
    return _can_be_cut(job)


def _can_take_back(job: Job) -> bool:
    """Not new modules or a soft prompt, nor weights of which each process has its part."""
    whole = world()[1] == 1 or job.session.plan.trains_new
    return whole and not job.replaces and not any(m.trains_prompt for m in job.session.plan.active)


def _can_be_cut(job: Job) -> bool:
    from holdfast.runs import settle
    from holdfast.runs.halves import Halves

    halves = Halves(job)
    try:
        settle.base_tensors(job.source, job.session)
        return all(halves.rows.values()) and bool(halves.suites)
    except HoldfastError:  # too few rows or items, a suite of lm-eval, or tensors of the base under other names
        return False


def named(job: Job) -> Mapping[str, float]:
    """The floors of the recipe."""
    return job.recipe.measure.keep


def others(job: Job) -> list[str]:
    """The suites that are held at KEEP_FRAC though no one named them."""
    return [] if job.recipe.measure.budget else [name for name in job.suites if name not in named(job)]


def margin(job: Job, kept: Mapping[str, Mapping[str, float]]) -> float:
    """How far the ability that is nearest to its floor lies above it; what the base does not have is not in `kept`."""
    above = [sure(kept[name]) - floor for name, floor in named(job).items() if name in kept]
    lost = [kept[name]["high"] - KEEP_FRAC for name in others(job) if name in kept]
    return min([*above, *(x for x in lost if x < 0)], default=0.0)


def floors_of(job: Job) -> dict[str, Any]:
    """For the report: the floors, and the suites that are held beside them."""
    return {"floors": dict(named(job)), "others": others(job)}
