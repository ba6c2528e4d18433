"""The end of a run: one report of everything, as page, Markdown, model card and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from holdfast import models
from holdfast.data.encoder import Encoder
from holdfast.data.metric import Metric, metric_of
from holdfast.data.sets import grouped, sets_of
from holdfast.data.shares import title
from holdfast.files import write_json, write_text
from holdfast.measure.compare import abilities, only_after, verdict
from holdfast.measure.tuned_task import cut_words, only, task_estimates
from holdfast.models.card import model_card
from holdfast.models.exported import Export
from holdfast.recipe import KEEP_FRAC
from holdfast.report import markdown, page
from holdfast.report.examples import answers, examples
from holdfast.report.seen import seen_rows
from holdfast.runs import budget, export
from holdfast.runs.abilities import words
from holdfast.runs.folder import LAST, RECIPE
from holdfast.runs.measuring import reported_rows
from holdfast.runs.run import Run
from holdfast.runs.several import by_first
from holdfast.runs.work import Job
from holdfast.versions import versions

HALF = "half of each suite; the other half chose what came out"
ROWS = 3  # of the training data that the report shows token by token
Measured = dict[str, Any]


def write(job: Job, tuned: Any, before: Measured | None, after: Measured) -> None:
    """Judge what was measured and write the report; before: None where the base was not measured."""
    run = job.run
    with run.timed("examples"):
        shown = examples(lambda: tuned, job.tokenizer, before["abilities"], after["abilities"]) if before else []
    report = _report(job, tuned, _judged(job, before, after), _task(job, before, after), shown)
    described = export.described(job, tuned)
    by_first(lambda: _write(run, report, described))


def _judged(job: Job, before: Measured | None, after: Measured) -> list[Any]:
    """Each ability before and after, and whether it was kept."""
    floors = job.recipe.measure.floors
    if before:
        return abilities(before["abilities"], after["abilities"], floors, KEEP_FRAC)
    return [only_after(a, floors.get(a["suite"], KEEP_FRAC)) for a in after["abilities"]]


def _task(job: Job, before: Measured | None, after: Measured) -> dict[str, Any]:
    """The task before and after; see `report.schema.TaskPart`."""
    task, metric = job.task, metric_of(job.task.metric)
    items = before["task"] if before else None
    return {
        "name": task.name,
        "metric": metric.words,
        "unit": metric.unit,
        "lower": metric.lower,
        "chance": task.chance,
        "split": "test" if job.recipe.data.test else "validation",
        "note": "; ".join(filter(None, [_note(job), _cut(metric, items, after["task"])])) or None,
        **task_estimates(metric, items, after["task"]),
        "sets": _sets(job, items, after["task"]),
        "answers": answers(reported_rows(job), items, after["task"], Encoder(job.tokenizer).without_end),
    }


def _cut(metric: Metric, before: list[Any] | None, after: list[Any]) -> str:
    """Which answers did not come to their end, where answers are judged and not only shown."""
    return cut_words(before, after) if metric.asked == "text" else ""


def _sets(job: Job, before: list[Any] | None, after: list[Any]) -> list[dict[str, Any]]:
    """The task's metric on the rows of each set, where there are several."""
    asked, metric = reported_rows(job), metric_of(job.task.metric)
    groups = grouped(range(len(after)), lambda n: asked[n].source)
    if len(groups) < 2:
        return []
    return [
        {"name": title(name), **only(metric, before and [before[n] for n in rows], [after[n] for n in rows])}
        for name, rows in groups.items()
    ]


def _data(job: Job, realised: dict[str, Any]) -> dict[str, Any]:
    """The data; of several training sets also how many rows of each there are, and how many were drawn."""
    sets, data = sets_of(job.recipe.data, "train", job.run.base_dir), job.recipe.data
    out = {"name": job.task.name, "train": ", ".join(one.source.path for one in sets), "rows": len(job.task.train)}
    if not isinstance(data.train, list):
        return out
    there = Counter(job.task.token_rows.sources)
    return out | {
        "sets": [
            {
                "name": title(one.name),
                "path": one.source.path,
                "weight": one.source.weight,
                "rows": there[one.name],
                "drawn": realised.get(one.name, {}).get("examples", 0),
            }
            for one in sets
        ]
    }


def _note(job: Job) -> str:
    """What is no error and must be said of the task's numbers."""
    t = job.recipe.training
    picked = {"the weights": t.load_best_model_at_end, "the learning rate": t.learning_rate == "search"}
    chose = [] if job.recipe.data.test or job.halved else [what for what, so in picked.items() if so]
    more = [f"the reported rows also chose {what}, which flatters them" for what in chose]
    training = job.run.folder.read("training.json")
    told = training.get("notes", ())
    return "; ".join(filter(None, [job.note, *told, budget.unasked(job), _chose(job), *_ends(training), *more]))


def _chose(job: Job) -> str:
    """That rows of the set that is reported on chose under the budget instead, where no others were there to."""
    given, reported = job.task.test or job.task.validation, reported_rows(job)
    left = len(given) - len(reported)
    if not job.budget or not left:
        return ""
    kind, cure = ("test", "data.validation") if job.recipe.data.test else ("validation", "data.test")
    return f"{left} of {len(given)} {kind} rows chose under the budget, the others are reported ({cure} gives all)"


def _ends(training: Mapping[str, Any]) -> list[str]:
    """Which weights came out, where these are not simply the last."""
    step, why = training.get("best_step"), training.get("ended")
    early = [f"the training ended early: {why}"] if why else []
    if why and step is None and "looks in a row" in why:  # others end where nothing is left to learn
        early.append(
            "its last weights came out, which were no better (training.load_best_model_at_end keeps the best)"
        )
    looked = [at for pairs in (training.get("looks") or {}).values() for at, _ in pairs]
    if step is None or step == max(looked, default=step):
        return early
    if step == 0:
        return [*early, "no look was better than the untouched base above the floors, so its weights came out"]
    return [*early, f"the weights after step {step} were the best look and came out"]


def _report(job: Job, tuned: Any, judged: list[Any], task: Any, shown: list[Any]) -> dict[str, Any]:
    """The whole report but the words of the recipe; see `report.schema.Report`."""
    run, recipe, source = job.run, job.recipe, job.source
    training, used = run.folder.read("training.json"), versions()
    return {
        "holdfast_version": used["holdfast"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": "tune",
        "verdict": verdict(judged, task, budget.asked_to_keep(job.recipe)),
        "model": {
            "name": source.name,
            "revision": source.revision,
            "sha": source.sha,
            "dtype": models.precision(tuned),
        },
        "tuned": {"name": job.task.name, "path": str(run.export), "sha": None, "export": training.get("export")},
        "task": task,
        "abilities": judged,
        "plan": run.folder.read("plan.json"),
        "data": _data(job, training.get("realised_mix") or {}),
        "training": training,
        "examples": shown,
        "rows": seen_rows(job, ROWS),
        "timing": {**training.get("timing", {}), **run.timing},
        "versions": used,
        "settings": {
            "num_fewshot": recipe.measure.num_fewshot,
            "limit": recipe.measure.limit,
            "seed": recipe.training.seed,
            **({"suites": said} if (said := words(recipe, job.suites)) else {}),
            "items": f"all, as this run has no budget: {job.unheld}" if job.unheld else HALF,
        },
    }


def _write(run: Run, report: dict[str, Any], described: Export) -> None:
    """The card, the pages, and report.json last: with it the run is finished."""
    report["recipe"] = (run.path / RECIPE).read_text(encoding="utf-8")
    base = str(described.base) if described.base else None
    adapter, replaced = described.adapter, described.replaced is not None
    card = model_card(report, adapter=adapter, replaced=replaced, code=described.code(), base=base)
    write_text(run.export / "README.md", card)
    page.write(report, run.path / "report.html")
    write_text(run.path / "report.md", markdown.summary(report))
    write_json(run.path / LAST, report)
