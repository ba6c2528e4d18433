"""One cell of the leaderboard: train, then ask everything. A process of its own, so that its peak memory is its own.

Every cell trains the same number of steps on the same rows in the same order, in bfloat16 compute, and is measured on
the task's test rows, the built-in suites, and 12 few-shot tasks of other authors (`Q: x / A: y`, 8 shots).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import leaderboard_talk
from leaderboard_cells import BASE, CHOOSES, Cell, Data, packed
from leaderboard_plans import HERE, SHOTS, TASKS, TEST, Size, plans

SPLIT_SEED, LONGEST = 0, 200  # tokens of a training prompt
OTHERS = "other authors"


@dataclass(frozen=True)
class Lab:
    """Where a cell gets what it needs. shared: a folder with text/<task> and icl, which are not shipped; trained: a
    folder of weights of plain full tuning, from which all methods that only merge begin, or None."""

    shared: Path
    model: str = "smollm2-135m"
    size: Size = field(default_factory=Size)
    trained: Path | None = None


@dataclass(frozen=True)
class Material:
    """Rows of a task: those that train, as text and as tokens; those that choose; those that are reported."""

    train: Sequence[Any]
    tokens: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    labels: tuple[str, ...]


def read(task: str, shared: Path, tokenizer: Any) -> tuple[list[Any], list[Any], list[Any], tuple[str, ...]]:
    """(train rows, token rows, test rows, labels)."""
    from holdfast.data.rows import cap, labels_of, read_rows
    from holdfast.data.tokens import tokenize

    def source(split: str) -> str:
        return f"holdfast:tickets/{split}.jsonl" if task == "tickets" else str(shared / f"text/{task}/{split}.jsonl")

    if task == "talk":
        with tempfile.TemporaryDirectory() as folder:
            rows = {s: leaderboard_talk.rows(s, tokenizer, Path(folder)) for s in ("train", "test")}
    else:
        rows = {s: read_rows(source(s), **TASKS[task], base_dir=HERE, tokenizer=tokenizer) for s in ("train", "test")}
    train = [r for r in rows["train"] if len(tokenizer.encode(r.prompt)) < LONGEST]
    tokens = [tokenize(r, tokenizer, 1024) for r in train]
    labels = () if task == "talk" else labels_of(rows["train"]) or ()  # answers in words: only the exact one counts
    return train, tokens, cap(rows["test"], TEST[task], 0), labels


def material(task: str, lab: Lab, tokenizer: Any) -> Material:
    """The rows of a cell; on the task that chooses the rate some training rows are cut off for it."""
    from holdfast.data.rows import split

    train, tokens, test, labels = read(task, lab.shared, tokenizer)
    test = test[: lab.size.test[task]]
    if task != CHOOSES:
        return Material(train, tokens, (), test, labels)
    stay, cut = split(train, lab.size.validation, SPLIT_SEED)
    return Material([train[n] for n in stay], [tokens[n] for n in stay], [train[n] for n in cut], test, labels)


def shared_items(shared: Path, limit: int, shots: int) -> list[tuple[str, Any]]:
    """(task, prompt) of the other authors' few-shot tasks."""
    from holdfast.data.fewshot import FORMATS, build

    out = []
    for file in sorted((shared / "icl").glob("*.json")):
        items = [(i["input"], i["output"]) for i in json.loads(file.read_text(encoding="utf-8"))]
        random.Random(file.stem).shuffle(items)
        for query in items[SHOTS : SHOTS + limit]:
            out.append((file.stem, build(FORMATS["qa"], items[:shots], query)))
    return out


# ---- asking


def asked(cell: Cell, lab: Lab, model: Any, tokenizer: Any, labels: Sequence[str]) -> tuple[Data, Data]:
    """Scores of all suites: {suite: {task: scores}}, and the chances {suite: {task: chance}}."""
    from holdfast.measure.asking import score_suite
    from holdfast.measure.probe import Ask
    from holdfast.measure.scorer import Scorer
    from holdfast.measure.suites import build

    scores: Data = {}
    chance: Data = {}
    more = lab.size.more if cell.seed or cell.method == BASE else {}
    for name, limit in {**lab.size.suites, **more}.items():
        found = score_suite(model, tokenizer, build(name, Ask(tokenizer, lab.size.shots, limit, labels=tuple(labels))))
        scores[name] = {t["name"]: [i["correct"] for i in t["items"]] for t in found["tasks"]}
        chance[name] = {t["name"]: t["chance"] for t in found["tasks"]}
    items = shared_items(lab.shared, lab.size.shared, lab.size.shots)
    given = Scorer(model, tokenizer).score([(p.context, p.answer + p.stop) for _, p in items])
    others: dict[str, list[int]] = {}
    for (name, _), s in zip(items, given, strict=True):
        others.setdefault(name, []).append(int(s.greedy))
    return {**scores, OTHERS: others}, {**chance, OTHERS: dict.fromkeys(others, 0.0)}


def divergence(base: Any, tuned: Any, rows: Sequence[Any], soft: Any = None) -> float:
    """Mean KL(base || tuned) in nats over the scored positions of token rows; `soft` stands before them in the tuned
    model."""
    import torch

    from holdfast.engine.base import batches
    from holdfast.engine.forward import forward
    from holdfast.engine.ways import SOFT_PROMPT, inner
    from holdfast.methods.loss._divergence import forward_kl

    if soft is not None:
        setattr(inner(tuned), SOFT_PROMPT, torch.nn.Parameter(soft, requires_grad=False))
    total, count = 0.0, 0
    with torch.no_grad():
        for _, batch in batches(rows, 1024):
            sides = [forward(model, batch)[1].float().log_softmax(-1) for model in (base, tuned)]
            each = forward_kl(*sides)
            total, count = total + float(each.sum()), count + len(each)
    if soft is not None:
        delattr(inner(tuned), SOFT_PROMPT)
    return total / count


def measure(cell: Cell, lab: Lab, model: Any, tokenizer: Any, rows: Material, soft: Any = None) -> Data:
    """Figures of a model and the packed scores behind them. What tells rates apart is asked of validation rows."""
    from holdfast import models
    from holdfast.data.tokens import tokenize
    from holdfast.measure.tuned_task import score_task

    def right(part: Sequence[Any]) -> list[int]:
        return [i["correct"] for i in score_task(model, tokenizer, part, rows.labels or None, soft_prompt=soft)]

    start = time.perf_counter()
    figures: Data = {}
    if rows.validation:
        figures["validation"] = round(fmean(right(rows.validation)), 4)
    task = right(rows.test)
    figures["task"] = round(fmean(task), 4)
    if cell.method != BASE:
        tokens = [tokenize(r, tokenizer, 1024) for r in rows.test[: lab.size.divergence]]
        figures["kl"] = round(divergence(models.load(lab.model)[0], model, tokens, soft), 6)
    suites, chance = asked(cell, lab, model, tokenizer, rows.labels)
    figures |= {name: round(fmean(fmean(s) for s in tasks.values()), 4) for name, tasks in suites.items()}
    return {
        "figures": figures,
        "measure_seconds": round(time.perf_counter() - start, 1),
        **({"chance": chance} if cell.method == BASE else {}),
        "task_scores": packed(task),
        "suites": {name: {t: packed(s) for t, s in tasks.items()} for name, tasks in suites.items()},
    }


# ---- training


@dataclass(frozen=True)
class Trained:
    """A trained model. facts: what else is worth a line; spent: cost of a training that another cell did for it."""

    model: Any
    soft: Any = None
    facts: Any = None
    spent: Mapping[str, float] = field(default_factory=dict)


def shared_training(path: Path, session: Any, train: Callable[[], Any]) -> tuple[Data, Mapping[str, float]]:
    """Train what a merge begins from and write it, or read what another cell has trained: (facts, cost of the other).

    The file has the weights as they train, in fp32, and the facts and cost in its header.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    import _common

    if path.is_file():
        session.enter(session.stages[-1])
        with safe_open(path, "pt") as file, torch.no_grad():
            for name, p in session.params.items():
                p.copy_(file.get_tensor(name))
            said = json.loads(file.metadata()["holdfast"])
        return said["facts"], said["spent"]
    begun, used = time.perf_counter(), time.process_time()
    facts = train()
    spent = {
        "train_seconds": round(time.perf_counter() - begun, 1),
        "train_cpu_seconds": round(time.process_time() - used, 3),
        "peak_bytes": _common.peak_bytes(),
    }
    weights = {n: p.detach().clone() for n, p in session.params.items()}
    half = path.with_suffix(f".{os.getpid()}")
    save_file(weights, half, {"holdfast": json.dumps({"facts": facts, "spent": spent})})
    half.replace(path)
    return facts, {}


def train_plan(cell: Cell, lab: Lab, model: Any, tokenizer: Any, rows: Material) -> Trained:
    """Train a method of Holdfast."""
    return train_methods(plans()[cell.method][0], cell, lab, model, tokenizer, rows)


def train_methods(
    methods: Sequence[Any],
    cell: Cell,
    lab: Lab,
    model: Any,
    tokenizer: Any,
    rows: Material,
    keep: Sequence[str] = (),
    watch: Any = None,
) -> Trained:
    """Train a plan of these methods as `holdfast tune` does, at the rate and the seed of `cell`.

    keep: parts of the loss whose course is a fact worth keeping: [step, value] of the steps that have them. watch:
    looks at the model while it trains, as `hosts.watching.Watch` does.
    """
    from holdfast.hosts.plain import Training, rows_of_run, train
    from holdfast.measure.tuned_task import score_task
    from holdfast.plan import Host, Plan
    from holdfast.services import Context
    from holdfast.session import Session

    assert cell.rate is not None
    compute, size = model.dtype, lab.size
    plan = Plan(methods)
    ctx = Context(model, tokenizer, cell.seed, rows.train, total_steps=size.steps, max_length=1024)
    plan.check(Host("benchmark"), ctx)
    session = Session(plan, model, ctx, compute_dtype=compute, knows_rows=True)
    mix = session.mix(rows.tokens)
    settings = Training(
        size.steps, size.batch, learning_rate=cell.rate, seed=cell.seed, autocast=compute, save_steps=0, watch=watch
    )
    session.prepare(list(rows_of_run(session, mix, settings)))

    def evaluate(m: Any) -> float:
        part = rows.train[-48:]
        soft = session.soft_prompt()
        return sum(i["correct"] for i in score_task(m, tokenizer, part, rows.labels or None, soft_prompt=soft))

    def run() -> Data:
        log = train(session, mix, settings, evaluate=evaluate)
        loss = [round(p["task"], 3) for _, p in log.loss]
        shown = {name: [[at, round(p[name], 6)] for at, p in log.loss if name in p] for name in keep}
        more = {"shown": shown} if keep else {}
        return {"tokens": log.tokens, "loss": loss, "realised": dict(log.realised), **more}

    if lab.trained is not None and all(m.sites() == ("merge",) for m in plan.methods):
        file = lab.trained / f"{cell.task}.{cell.rate}.{cell.seed}.safetensors"
        facts, spent = shared_training(file, session, run)
    else:
        facts, spent = run(), {}
    session.merge()
    tuned, soft = session.finished_model(compute)
    return Trained(tuned, soft, facts, spent)


def train_cell(cell: Cell, lab: Lab, model: Any, tokenizer: Any, rows: Material) -> Trained:
    import leaderboard_peers

    if cell.method in leaderboard_peers.PEERS:
        assert cell.rate is not None
        tuned = leaderboard_peers.train(
            cell.method, model, tokenizer, rows.tokens, cell.rate, cell.seed, lab.size.steps, lab.size.batch
        )
        return Trained(tuned, facts={})
    return train_plan(cell, lab, model, tokenizer, rows)


def run(cell: Cell, lab: Lab, words: str) -> Data:
    """Train and measure one cell. words: what the method is, for the record."""
    import _common
    from holdfast import models

    start, before = time.perf_counter(), time.process_time()
    model, tokenizer = models.load(lab.model)
    rows = material(cell.task, lab, tokenizer)
    facts: Data = {"task": cell.task, "method": cell.method, "rate": cell.rate, "seed": cell.seed, "plan": words}
    facts |= {"model": lab.model, "steps": lab.size.steps, "batch": lab.size.batch, "dtype": str(model.dtype)}
    cost: Data = {}
    trained = Trained(model, facts={})
    if cell.method != BASE:
        begun, used = time.perf_counter(), time.process_time()
        trained = train_cell(cell, lab, model, tokenizer, rows)
        cost["train_seconds"] = round(time.perf_counter() - begun, 1)
        cost["train_cpu_seconds"] = round(time.process_time() - used, 3)
        cost["peak_bytes"] = max(_common.peak_bytes(), trained.spent.get("peak_bytes", 0))
        cost |= {k: round(cost[k] + v, 1) for k, v in trained.spent.items() if k != "peak_bytes"}
    found = measure(cell, lab, trained.model, tokenizer, rows, trained.soft)
    cost["measure_seconds"] = found.pop("measure_seconds")
    cost |= {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - before, 1)}
    return {**facts, "figures": found.pop("figures"), "cost": cost, "made": made(), **trained.facts, **found}


def made() -> Data:
    """When, from which commit and on what."""
    import torch

    import _common
    from holdfast.versions import versions

    facts = _common.facts()
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    machine = f"{facts['cpu']}, {torch.get_num_threads()} of {facts['cores']} cores"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": done.stdout.strip() or None,
        "machine": machine,
        "torch": versions()["torch"],
    }
