"""Measuring a model's abilities and, within a run, its task; what is known of the same content is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.data.metric import metric_of
from holdfast.data.rows import Row
from holdfast.files import content_key
from holdfast.measure.parts import REPORT
from holdfast.measure.suites import code_of_ours, measure_suite, remembered
from holdfast.measure.tuned_task import written
from holdfast.runs.halves import SUITES_SHARE, halves_of
from holdfast.runs.task_rows import score_rows
from holdfast.runs.work import Job
from holdfast.versions import versions

SHOWN, SHOWN_TOKENS = 4, 96  # answers that are written for the report alone, and the tokens of each


def measure_suites(
    names: Sequence[str],
    model: Callable[[], Any],
    tokenizer: Any,
    tell: Callable[[float, str], None],
    **settings: Any,
) -> list[dict[str, Any]]:
    """Measure suites one after the other; `settings` go to `measure_suite`.

    model: gives the model, and is called only if something is not in the cache. tell: hears share done and suite.
    """
    return [
        measure_suite(
            name,
            model,
            tokenizer,
            progress=lambda x, n=n, name=name: tell((n + x) / len(names), name),
            **settings,
        )
        for n, name in enumerate(names)
    ]


def measured(job: Job, when: str, model: Any, soft_prompt: Any = None) -> dict[str, Any]:
    """{"abilities", "task"} of one model, from the run folder if they are there and were made as they would be now.

    What another version, device or precision measured rounds otherwise: it is measured anew, not mixed with ours.

    when: "before" (the base, whose half is kept by content for later runs too) or "after".
    """
    run, name = job.run, f"{when}.json"
    found, made = run.folder.read(name), made_by(model)
    if found and found.get("made") == made:
        return found
    key = base_key(job, model) if when == "before" else None

    def tell(share: float, words: str) -> None:
        run.tell(f"measure {when}", share, words)

    tell(0.0, "")
    with run.timed(f"measure {when}"):
        parts = {"abilities": _abilities(job, model, key, tell), "task": _task(job, model, soft_prompt, key, tell)}
    out = {**parts, "made": made}
    tell(1.0, "")
    run.folder.write(name, out)
    return out


def made_by(model: Any) -> list[str]:
    """What decides a measurement of this model beside the recipe: versions, our code, device and precision."""
    return [*(f"{k} {v}" for k, v in versions().items()), code_of_ours(), model.device.type, str(model.dtype)]


def reported_rows(job: Job) -> Sequence[Row]:
    """The rows of the task that the report is about: those that chose nothing."""
    return halves_of(job).rows[REPORT] if job.budget else job.task.test


def base_key(job: Job, model: Any) -> str | None:
    """Under what the cache keeps answers of this base; None where its content has no name."""
    if not job.source.sha:
        return None
    packed = "nf4, " if job.recipe.model.load_in_4bit else ""
    return content_key(job.source.sha, f"{packed}{model.dtype}", model.device.type)


def _abilities(job: Job, model: Any, key: str | None, tell: Callable[[float, str], None]) -> list[dict[str, Any]]:
    m = job.recipe.measure

    def told(share: float, suite: str) -> None:
        tell(SUITES_SHARE * share, suite)

    if job.budget:  # the others chose how much of the change stays
        return halves_of(job).abilities(REPORT, model, key=key, tell=told)
    return measure_suites(
        job.suites,
        lambda: model,
        job.tokenizer,
        told,
        num_fewshot=m.num_fewshot,
        limit=m.limit,
        labels=job.task.names,
        **m.forwards,
        cache_key=key,
    )


def _task(
    job: Job, model: Any, soft_prompt: Any, key: str | None, tell: Callable[[float, str], None]
) -> list[dict[str, Any]]:
    def told(share: float) -> None:
        tell(SUITES_SHARE + (1 - SUITES_SHARE) * share, "task")

    items = score_rows(job, model, reported_rows(job), soft_prompt, key=key, progress=told)
    if metric_of(job.task.metric).asked == "answer" and soft_prompt is None:  # generation does not hear a soft prompt
        _add_texts(job, model, items, key)
    return items


def _add_texts(job: Job, model: Any, items: Sequence[dict[str, Any]], key: str | None) -> None:
    """A few answers in words, for the report alone."""
    m, rows = job.recipe.measure, reported_rows(job)
    asked = [n for n, row in enumerate(rows) if row.prompt][:SHOWN]
    shown, most = [rows[n] for n in asked], m.max_new_tokens or SHOWN_TOKENS
    name = key and content_key(key, [[r.where, r.prompt, r.completion] for r in shown], "shown", most, m.rounds_as)
    said = remembered(name, lambda: written(model, job.tokenizer, shown, most, **m.forwards))
    for n, one in zip(asked, said, strict=True):
        items[n].update(one)
