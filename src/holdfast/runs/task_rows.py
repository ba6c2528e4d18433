"""The rows of a run's task, scored by its metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.data import own_metric
from holdfast.data.encoder import encoder_of
from holdfast.data.metric import judge_of, metric_of
from holdfast.data.rows import Row
from holdfast.data.sets import sets_of
from holdfast.engine import processes
from holdfast.errors import DataError
from holdfast.files import content_key
from holdfast.measure.suites import remembered
from holdfast.measure.tuned_task import judged, plainly, score_task, written
from holdfast.runs.work import Job


def score_rows(
    job: Job,
    model: Any,
    rows: Sequence[Row],
    soft_prompt: Any = None,
    *,
    key: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the task scored by its metric, in a form that `tuned_task.task_estimates` reads.

    key: of the model's content, for what is kept of a base.
    """
    task, m, metric = job.task, job.recipe.measure, metric_of(job.task.metric)
    labels = task.labels if metric.asked == "labels" else None
    asked = [[r.where, r.prompt, r.completion, *([] if r.ends else ["goes on"])] for r in rows]
    name = key and content_key(key, asked, labels, metric.asked, m.max_new_tokens, m.rounds_as)
    settings = {**m.forwards, "progress": progress}
    if metric.asked == "text":
        said = remembered(name, lambda: written(model, job.tokenizer, rows, m.max_new_tokens, **settings))
        plain = plainly(rows, encoder_of(model, job.tokenizer))
        return _by_first(lambda: judged(plain, said, _judge(job, rows), metric.top or 1.0))
    return remembered(
        name, lambda: score_task(model, job.tokenizer, rows, labels, soft_prompt=soft_prompt, **settings)
    )


def _by_first(judge: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the first of several processes judges: a user's function need not say the same twice."""

    def told() -> list[Any]:
        try:
            return [judge(), None]
        except DataError as error:
            return [None, [error.what, error.cure]]

    found, error = processes.told(told)
    if error:
        raise DataError(*error)
    return found


def _judge(job: Job, rows: Sequence[Row]) -> Callable[[str, Row], float]:
    name, base_dir = job.task.metric, job.run.base_dir
    if ":" not in name:
        return judge_of(name)
    asked = set(rows)
    roles = sorted(("test", "validation"), key=lambda role: -len(asked.intersection(getattr(job.task, role))))
    sets = [s for role in (*roles, "train") for s in sets_of(job.recipe.data, role, base_dir)]
    return own_metric.judge(name, base_dir, sets, rows)
