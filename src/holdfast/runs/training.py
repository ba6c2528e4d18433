"""The training of a run: prepare, train stage by stage, merge, export, and say in training.json what happened."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from holdfast import models
from holdfast.data.metric import metric_of
from holdfast.engine.forward import inner
from holdfast.engine.processes import first
from holdfast.errors import TrainingError
from holdfast.hosts import early, plain
from holdfast.hosts.checkpoint import Checkpoint
from holdfast.hosts.watching import chosen
from holdfast.measure.tuned_task import score_task
from holdfast.runs import export, settle
from holdfast.runs.change import Change
from holdfast.runs.checks import not_finite
from holdfast.runs.halves import choosing_rows
from holdfast.runs.looking import watch_of
from holdfast.runs.rate import Rate
from holdfast.runs.rate_search import searched
from holdfast.runs.tracking import Trackers
from holdfast.runs.work import Job
from holdfast.sites import replace

MOST_DRAWN = 1 << 20  # rows that are looked through beforehand
EVALUATED = 64  # rows that choose the best checkpoint of a stage


def trained(job: Job) -> tuple[Any, Any]:
    """The tuned model and its soft prompt (or None), trained and exported.

    Raises:
        TrainingError: the loss or a weight is not finite, or the export is not the model that was trained.
    """
    base_dtype, start = job.model.dtype, time.perf_counter()
    export.place_base(job)
    log, rate = _train(job)
    job = dataclasses.replace(job, rate=rate)
    tuned, soft, settled = _finished(job, base_dtype)
    job.run.timing["tune"] = log.seconds
    export.save(job, tuned, soft)
    said = export.check(job, tuned, soft)
    if verdicts := job.session.ctx.verdicts:
        job.run.folder.write("verdicts.json", verdicts)
    job.run.folder.write("training.json", _part(job, log, said, settled, time.perf_counter() - start))
    Checkpoint(job.run.path).clear()
    return tuned, soft


def _train(job: Job) -> tuple[plain.Log, Rate]:
    recipe, log = job.recipe, plain.Log()
    told = recipe.training.report_to if first() else ()
    trackers = Trackers(told, job.run.path, recipe.model_dump(), recipe.training.run_name)

    def looked(step: int, finding: dict[str, float], seconds: float) -> None:
        trackers.look(step, finding, seconds)
        of, words = job.training.num_steps, "  ".join(f"{k} {v:.3f}" for k, v in finding.items())
        job.run.tell("tune", step / of, f"step {step}/{of}  look: {words}")
        if first():
            job.run.folder.log({"step": step, "of": of, "look": finding})

    try:
        job.training.watch = watch_of(job, looked)
        _prepare(job)
        rate = searched(job) if recipe.training.learning_rate == "search" else job.rate
        job.training.learning_rate = rate.value
        on_step, evaluate = _on_step(job, trackers, log), _evaluate(job)
        done = plain.train(job.session, job.mix, job.training, on_step=on_step, evaluate=evaluate, log=log)
        if done.ended and done.loss and not _is_told(job, done.loss[-1][0] + 1):  # nobody knew that it was the last
            _write_step(job, trackers, log, done.loss[-1][0] + 1, done.loss[-1][1])
        return done, rate
    finally:
        trackers.finish()


def _prepare(job: Job) -> None:
    """What methods want to know of the untouched base, and one step that must reach what trains."""
    session, training, run = job.session, job.training, job.run
    with run.timed("prepare"):
        run.tell("prepare", 0.0, "")
        session.ctx.tell = lambda share, words: run.tell("prepare", share, words)
        drawn = islice(plain.rows_of_run(session, job.mix, training), MOST_DRAWN)
        session.prepare(drawn, lambda x: run.tell("prepare", x, "base answers"))
        session.enter(session.stages[-1])
        session.probe(list(islice(plain.rows_of_run(session, job.mix, training), 2)), training.autocast)
        if job.recipe.training.gradient_checkpointing:
            inner(session.model).gradient_checkpointing_enable({"use_reentrant": False})


def _on_step(job: Job, trackers: Trackers, log: plain.Log) -> Callable[[int, int, dict[str, float]], None]:
    def on_step(step: int, of: int, parts: dict[str, float]) -> None:
        if _is_told(job, step):
            _write_step(job, trackers, log, step, parts)
        words = "  ".join(f"{k} {v:.3f}" for k, v in parts.items())
        job.run.tell("tune", step / of, f"step {step}/{of}  {words}")

    return on_step


def _is_told(job: Job, step: int) -> bool:
    """Whether a step goes into the log and the trackers, whatever comes of the run."""
    return step % job.recipe.training.logging_steps == 0 or step == job.training.num_steps


def _write_step(job: Job, trackers: Trackers, log: plain.Log, step: int, parts: dict[str, float]) -> None:
    if first():
        job.run.folder.log({"step": step, "of": job.training.num_steps, **parts})
        trackers.step(step, parts, log)


def _evaluate(job: Job) -> Callable[[Any], float]:
    """Answers that are right, and between equals their log-probability; of free text that of a token."""
    task = job.task
    closed = task.labels if task.metric == "accuracy" else None

    def evaluate(model: Any) -> float:
        rows = choosing_rows(job)[:EVALUATED] or task.train[:EVALUATED]
        with job.session.between_steps():
            scored = score_task(model, job.tokenizer, rows, closed, soft_prompt=job.session.soft_prompt())
        if metric_of(task.metric).asked != "labels" and task.metric != "exact_match":
            return sum(i["logprob"] for i in scored) / sum(i["tokens"] for i in scored)
        return sum(i["correct"] for i in scored) + 1e-3 * sum(i["logprob"] for i in scored) / len(scored)

    return evaluate


def _finished(job: Job, base_dtype: Any) -> tuple[Any, Any, dict[str, Any] | None]:
    """(tuned model in the base's dtype, soft prompt or None, what the budget took) after the plan's merging.

    Nothing broken gets out.
    """
    session, asked = job.session, job.recipe.export
    session.merge()
    session.finish()
    bad = not_finite(session.model)
    if bad:
        what = f"The weight {bad} of the tuned model is not finite; it is not exported."
        raise TrainingError(what, "Start again with a lower training.learning_rate and another output_dir.")
    change = Change(job) if job.budget else None
    tuned, soft = session.finished_model(base_dtype)
    settled = None
    if change:
        tuned, settled = settle.settle(job, change, tuned, soft)
    if asked.merge and hasattr(tuned, "peft_config"):
        tuned = models.merged(tuned, f"The adapter of this run on {job.source.label}")
    elif asked.merge and job.replaces:
        replace.merge(tuned, next(m for m in session.methods if "replace" in m.sites()))
    export.round_to(job, tuned)
    return tuned, soft, settled


def _looks(log: plain.Log) -> dict[str, list[list[float]]]:
    """name -> [[step, value]] of what was seen during training."""
    names = dict.fromkeys(k for _, _, finding in log.looks for k in finding)
    return {k: [[step, finding[k]] for step, _, finding in log.looks if k in finding] for k in names}


def _advice(job: Job) -> list[str]:
    """What the guide for small models says to a run that trains all weights."""
    rows = job.training.batch_size * job.training.gradient_accumulation_steps
    return [] if any(m.wraps for m in job.session.plan.active) else early.advice(rows, job.training.learning_rate)


def _part(
    job: Job, log: plain.Log, export_said: str | None, settled: dict[str, Any] | None, seconds: float
) -> dict[str, Any]:
    """What the report says about the training; see `report.schema.TrainingPart`. seconds: of all of it."""
    realised: dict[str, dict[str, int]] = {}
    for key, count in log.realised.items():
        name, unit = key.rsplit("/", 1)
        realised.setdefault(name, {})[unit] = count
    terms = {k for _, p in log.loss for k in p} - {"task"}
    return {
        "steps": len(log.loss),
        "rate": job.rate.said(),
        "ended": log.ended or None,
        "looks": _looks(log),
        "best_step": chosen(log.looks) if job.training.keep_best else None,
        "seconds": log.seconds,
        "seconds_with_prepare": seconds,
        "tokens": log.tokens,
        "tokens_per_second": log.tokens / max(log.seconds, 1e-9),
        "loss": [[s, p["task"]] for s, p in log.loss],
        "terms": {t: [[s, p[t]] for s, p in log.loss if t in p] for t in sorted(terms)},
        "realised_mix": realised,
        "left_out": job.session.left_out,
        "early": log.early.said(log.loss),
        "notes": [
            *job.session.ctx.notes,
            *_advice(job),
            *([settled["said"]] if settled else []),
        ],
        "budget": settled,
        "export": export_said,
        "timing": job.run.timing,
    }
