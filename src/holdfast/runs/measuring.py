"""Measuring a model's abilities and, within a run, its task; what is known of the same content is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.files import content_key
from holdfast.measure.suites import measure_suite, names_of, remembered
from holdfast.measure.tuned_task import score_task
from holdfast.runs.job import Job

SUITES_SHARE = 0.7  # of the time a measurement takes, as its bar shows it; the task takes the rest


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
    """{"abilities", "task"} of one model, from the run folder if they are there.

    when: "before" (the base, whose half is kept by content for later runs too) or "after".
    """
    run, name = job.run, f"{when}.json"
    found = run.folder.read(name)
    if found:
        return found
    key = _key(job, model) if when == "before" else None

    def tell(share: float, words: str) -> None:
        run.tell(f"measure {when}", share, words)

    tell(0.0, "")
    with run.timed(f"measure {when}"):
        out = {"abilities": _abilities(job, model, key, tell), "task": _task(job, model, soft_prompt, key, tell)}
    tell(1.0, "")
    run.folder.write(name, out)
    return out


def _key(job: Job, model: Any) -> str | None:
    """Under what the cache keeps answers of this base; None where its content has no name."""
    if not job.source.sha:
        return None
    packed = "nf4, " if job.recipe.model.load_in_4bit else ""
    return content_key(job.source.sha, f"{packed}{model.dtype}", model.device.type)


def _abilities(job: Job, model: Any, key: str | None, tell: Callable[[float, str], None]) -> list[dict[str, Any]]:
    m = job.recipe.measure
    return measure_suites(
        names_of(m.suites),
        lambda: model,
        job.tokenizer,
        lambda share, suite: tell(SUITES_SHARE * share, suite),
        num_fewshot=m.num_fewshot,
        limit=m.limit,
        labels=job.task.labels or (),
        batch_tokens=m.batch_tokens,
        cache_key=key,
    )


def _task(
    job: Job, model: Any, soft_prompt: Any, key: str | None, tell: Callable[[float, str], None]
) -> list[dict[str, Any]]:
    task, batch_tokens = job.task, job.recipe.measure.batch_tokens
    rows = [[r.where, r.prompt, r.completion] for r in task.test]
    return remembered(
        key and content_key(key, rows, task.labels, batch_tokens),
        lambda: score_task(
            model,
            job.tokenizer,
            task.test,
            task.labels,
            soft_prompt=soft_prompt,
            batch_tokens=batch_tokens,
            progress=lambda share: tell(SUITES_SHARE + (1 - SUITES_SHARE) * share, "task"),
        ),
    )
