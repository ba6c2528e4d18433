"""The training of a run: prepare, train stage by stage, merge, export, and say in training.json what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from holdfast import models
from holdfast.engine.forward import inner
from holdfast.engine.processes import first
from holdfast.errors import TrainingError
from holdfast.hosts import plain
from holdfast.hosts.checkpoint import Checkpoint
from holdfast.measure.tuned_task import score_task
from holdfast.runs import export
from holdfast.runs.checks import not_finite
from holdfast.runs.job import Job

MOST_DRAWN = 1 << 20  # rows that are looked through beforehand
EVALUATED = 64  # rows that choose the best checkpoint of a stage


def trained(job: Job) -> tuple[Any, Any]:
    """The tuned model and its soft prompt (or None), trained and exported.

    Raises:
        TrainingError: the loss or a weight is not finite, or the export is not the model that was trained.
    """
    base_dtype, start = job.model.dtype, time.perf_counter()
    export.place_base(job)
    _prepare(job)
    log = plain.train(job.session, job.mix, job.training, on_step=_on_step(job), evaluate=_evaluate(job))
    tuned, soft = _finished(job, base_dtype)
    job.run.timing["tune"] = log.seconds
    export.save(job, tuned, soft)
    said = export.check(job, tuned, soft)
    job.run.folder.write("training.json", _part(job, log, said, time.perf_counter() - start))
    Checkpoint(job.run.path).clear()
    return tuned, soft


def _prepare(job: Job) -> None:
    """What methods want to know of the untouched base, and one step that must reach what trains."""
    session, training, run = job.session, job.training, job.run
    with run.timed("prepare"):
        run.tell("prepare", 0.0, "")
        rows = min(training.num_steps * training.batch_size * training.gradient_accumulation_steps, MOST_DRAWN)
        drawn = islice(job.mix.draw(training.seed), rows)
        session.prepare(drawn, lambda x: run.tell("prepare", x, "base answers"))
        session.enter(session.stages[-1])
        session.probe(list(islice(job.mix.draw(training.seed), 2)), training.autocast)
        if job.recipe.training.gradient_checkpointing:
            inner(session.model).gradient_checkpointing_enable({"use_reentrant": False})


def _on_step(job: Job) -> Callable[[int, int, dict[str, float]], None]:
    run, every, writes = job.run, job.recipe.training.logging_steps, first()

    def on_step(step: int, of: int, parts: dict[str, float]) -> None:
        if writes and (step % every == 0 or step == of):
            run.folder.log({"step": step, "of": of, **parts})
        words = "  ".join(f"{k} {v:.3f}" for k, v in parts.items())
        run.tell("tune", step / of, f"step {step}/{of}  {words}")

    return on_step


def _evaluate(job: Job) -> Callable[[Any], float]:
    """Answers that are right, and between equals their log-probability."""
    task = job.task

    def evaluate(model: Any) -> float:
        rows = task.validation[:EVALUATED] or task.train[:EVALUATED]
        scored = score_task(model, job.tokenizer, rows, task.labels, soft_prompt=job.session.soft_prompt())
        return sum(i["correct"] for i in scored) + 1e-3 * sum(i["logprob"] for i in scored) / len(scored)

    return evaluate


def _finished(job: Job, base_dtype: Any) -> tuple[Any, Any]:
    """(tuned model in the base's dtype, soft prompt or None) after the plan's merging; nothing broken gets out."""
    session = job.session
    session.merge()
    session.finish()
    bad = not_finite(session.model)
    if bad:
        what = f"The weight {bad} of the tuned model is not finite; it is not exported."
        raise TrainingError(what, "Start again with a lower training.learning_rate and another output_dir.")
    tuned, soft = session.finished_model(base_dtype)
    if job.recipe.export.merge and hasattr(tuned, "peft_config"):
        tuned = models.merged(tuned, f"The adapter of this run on {job.source.label}")
    return tuned, soft


def _part(job: Job, log: plain.Log, export_said: str | None, seconds: float) -> dict[str, Any]:
    """What the report says about the training; see `report.schema.TrainingPart`. seconds: of all of it."""
    realised: dict[str, dict[str, int]] = {}
    for key, count in log.realised.items():
        name, unit = key.rsplit("/", 1)
        realised.setdefault(name, {})[unit] = count
    terms = {k for _, p in log.loss for k in p} - {"task"}
    return {
        "steps": job.training.num_steps,
        "seconds": log.seconds,
        "seconds_with_prepare": seconds,
        "tokens": log.tokens,
        "tokens_per_second": log.tokens / max(log.seconds, 1e-9),
        "loss": [[s, p["task"]] for s, p in log.loss],
        "terms": {t: [[s, p[t]] for s, p in log.loss if t in p] for t in sorted(terms)},
        "realised_mix": realised,
        "left_out": job.session.left_out,
        "export": export_said,
        "timing": job.run.timing,
    }
