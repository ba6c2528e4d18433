"""What a look during training sees: the task on validation rows, and a cheap probe of the abilities with a floor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from holdfast.data.metric import metric_of
from holdfast.hosts.watching import Watch
from holdfast.measure.compare import ability
from holdfast.measure.tuned_task import task_estimates
from holdfast.recipe import KEEP_FRAC
from holdfast.runs.budget import asked_to_keep
from holdfast.runs.halves import choosing_rows, halves_of
from holdfast.runs.measuring import made_by, measure_suites
from holdfast.runs.task_rows import score_rows
from holdfast.runs.work import Job

ROWS = 100  # validation rows of a look
ITEMS = 8  # of each task of a suite: a look, not a verdict
PROBE = "probe.json"  # the base's answers, in the run folder


def watch_of(job: Job, tell: Callable[[int, dict[str, float], float], None]) -> Watch | None:
    """The looks that the recipe asks for, if any. The model must be the untouched base.

    tell: hears step, finding ("task" in the metric's own unit, and the share kept of each suite) and seconds it took.
    """
    t = job.recipe.training
    if t.eval_steps is None:
        return None
    base = _base(job)

    def look(model: Any, step: int) -> tuple[float | None, dict[str, float]]:
        start = time.perf_counter()
        with job.run.timed("look"), job.session.between_steps():
            rank, finding = _look(job, model, base)
        tell(step, finding, time.perf_counter() - start)
        return rank, finding

    return Watch(t.eval_steps, look, t.load_best_model_at_end, t.early_stopping_patience)


def _base(job: Job) -> list[Any]:
    """What the untouched base answers, from the run folder if it was asked as it would be now."""
    known, made = job.run.folder.read(PROBE), made_by(job.model)
    if isinstance(known, dict) and known.get("made") == made:  # a list in folders of an earlier version
        return known["abilities"]
    with job.run.timed("look"), job.session.between_steps():
        found = _probe(job, job.model)
    job.run.folder.write(PROBE, {"made": made, "abilities": found})
    return found


def _look(job: Job, model: Any, base: list[Any]) -> tuple[float | None, dict[str, float]]:
    """(the task's score, higher is better, or None below a floor; finding)."""
    metric, floors = metric_of(job.task.metric), _floors(job)
    items = score_rows(job, model, choosing_rows(job)[:ROWS], job.session.soft_prompt())
    value = task_estimates(metric, None, items)["after"]["value"]
    parts = [ability(b, a, floors[b["suite"]]) for b, a in zip(base, _probe(job, model), strict=True)]
    kept = {p["name"]: p["retention"]["value"] for p in parts if p["retention"]}
    good = all(share >= floors[name] for name, share in kept.items())
    rank = (-value if metric.lower else value) if good else None
    return rank, {"task": value, **{f"kept/{name}": share for name, share in kept.items()}}


def _floors(job: Job) -> dict[str, float]:
    """What a look rules out: of few items no more than KEEP_FRAC, unless the recipe asks for more itself."""
    keep = job.recipe.measure.floors
    return {
        name: floor if name in asked_to_keep(job.recipe) else min(floor, KEEP_FRAC) for name, floor in keep.items()
    }


def _probe(job: Job, model: Any) -> list[Any]:
    """A few items of each suite that has a floor."""
    m = job.recipe.measure
    names = [name for name in job.suites if name in m.floors]
    if job.halved:
        return halves_of(job).looked_at(names, model, ITEMS)
    settings: dict[str, Any] = {"num_fewshot": m.num_fewshot, "limit": min(m.limit or ITEMS, ITEMS), **m.forwards}
    settings["labels"] = job.task.names
    return measure_suites(names, lambda: model, job.tokenizer, lambda *_: None, **settings)
