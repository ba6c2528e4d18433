"""The table of docs/results.md: what each method learns and what it keeps. Resumable: one JSON per run.

    python benchmarks/results.py run --shared ../shared/data --workers 2     # trains what is missing
    python benchmarks/results.py table                                      # writes docs/results.md and the plot

Tasks: the shipped tickets, and SST-2, RTE and AG News from --shared (not shipped). Every run trains the same number of
steps on the same rows in the same order, and is measured on the task's test rows, the built-in held-out in-context
tasks, and 12 few-shot tasks of other authors in --shared/icl (their own format, `Q: x / A: y`, 8 shots).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import results_table
from leaderboard_plans import BATCH, HERE, LIMIT, OUT, SHARED_LIMIT, STEPS, TASKS, TEST, path_of, plans, wanted

# ---- one run


def read(task: str, shared: Path, tokenizer: Any) -> tuple[list[Any], list[Any], list[Any], tuple[str, ...]]:
    """(train rows, token rows, test rows, labels)."""
    from holdfast.data.rows import cap, labels_of, read_rows
    from holdfast.data.tokens import tokenize

    def source(split: str) -> str:
        return f"holdfast:tickets/{split}.jsonl" if task == "tickets" else str(shared / f"text/{task}/{split}.jsonl")

    rows = {s: read_rows(source(s), **TASKS[task], base_dir=HERE, tokenizer=tokenizer) for s in ("train", "test")}
    train = [r for r in rows["train"] if len(tokenizer.encode(r.prompt)) < 200]
    return (
        train,
        [tokenize(r, tokenizer, 1024) for r in train],
        cap(rows["test"], TEST[task], 0),
        labels_of(rows["train"]) or (),
    )


def shared_items(shared: Path) -> list[tuple[str, Any]]:
    """(task, prompt) of the other authors' few-shot tasks."""
    from holdfast.data.fewshot import FORMATS, build

    out = []
    for file in sorted((shared / "icl").glob("*.json")):
        if file.name == "LICENSE":
            continue
        items = [(i["input"], i["output"]) for i in json.loads(file.read_text(encoding="utf-8"))]
        random.Random(file.stem).shuffle(items)
        for query in items[8 : 8 + SHARED_LIMIT]:
            out.append((file.stem, build(FORMATS["qa"], items[:8], query)))
    return out


def measure(model: Any, tokenizer: Any, test: list[Any], labels: Any, shared: Path, soft: Any = None) -> dict:
    """Everything the table needs, per item."""
    from holdfast.measure.scorer import Scorer
    from holdfast.measure.suites.in_context import measure as in_context
    from holdfast.measure.tasks import held_out_tasks
    from holdfast.measure.tuned_task import score_task

    start = time.perf_counter()
    held = in_context(model, tokenizer, held_out_tasks(), limit=LIMIT)
    items = shared_items(shared)
    scores = Scorer(model, tokenizer).score([(p.context, p.answer + p.stop) for _, p in items])
    other: dict[str, list[int]] = {}
    for (name, _), s in zip(items, scores, strict=True):
        other.setdefault(name, []).append(int(s.greedy))
    task = [i["correct"] for i in score_task(model, tokenizer, test, labels, soft_prompt=soft)]
    return {
        "task": task,
        "held_out": {t["name"]: [i["correct"] for i in t["items"]] for t in held["tasks"]},
        "chance": {t["name"]: t["chance"] for t in held["tasks"]},
        "shared": other,
        "measure_seconds": time.perf_counter() - start,
    }


def run(task: str, method: str, seed: int, shared: Path) -> None:
    """Train and measure one cell; write its JSON (and those of the closed-form merges)."""
    import torch

    from holdfast import methods as M
    from holdfast import models
    from holdfast.files import write_json
    from holdfast.hosts.plain import Training, train
    from holdfast.measure.tuned_task import score_task
    from holdfast.plan import Host, Plan
    from holdfast.services import Context
    from holdfast.session import Session
    from holdfast.sites.merging import Merging

    model, tokenizer = models.load("smollm2-135m")
    compute = model.dtype
    rows, tokens, test, labels = read(task, shared, tokenizer)
    facts = {"data": task, "method": method, "seed": seed, "steps": STEPS, "batch": BATCH, "dtype": str(compute)}
    if method == "base":
        write_json(path_of(task, method, seed), facts | measure(model, tokenizer, test, labels, shared))
        return
    methods, lr = plans()[method]
    merges = {"wise-ft": M.WiSEFT(), "lines": M.LiNeS(), "ties, one model": M.TIES()} if method == "full" else {}
    plan = Plan([*methods, *merges.values()])
    ctx = Context(model, tokenizer, seed, rows, total_steps=STEPS, max_length=1024)
    plan.check(Host("benchmark"), ctx)
    session = Session(plan, model, ctx, compute_dtype=compute, knows_rows=True)
    mix = session.mix(tokens)
    order = mix.draw(seed)
    start = time.perf_counter()
    session.prepare([next(order) for _ in range(STEPS * BATCH)])
    prepared = time.perf_counter() - start

    def evaluate(m: Any) -> float:
        part = rows[-48:]
        return sum(i["correct"] for i in score_task(m, tokenizer, part, labels, soft_prompt=session.soft_prompt()))

    settings = Training(STEPS, BATCH, learning_rate=lr, seed=seed, autocast=compute, save_steps=0)
    log = train(session, mix, settings, evaluate=evaluate)
    facts |= {"lr": lr, "train_seconds": log.seconds, "prepare_seconds": prepared, "tokens": log.tokens}
    facts["loss"] = [round(p["task"], 4) for _, p in log.loss]
    facts["realised"] = dict(log.realised)
    if not merges:
        session.merge()
        tuned, soft = session.finished_model(compute)
        write_json(path_of(task, method, seed), facts | measure(tuned, tokenizer, test, labels, shared, soft))
        return
    kept = {n: p.detach().clone() for n, p in session.params.items()}
    for name, merge in (("full", None), *merges.items()):
        for p in model.parameters():
            p.data = p.data.float()
        with torch.no_grad():
            for n, p in session.params.items():
                p.copy_(kept[n])
        if merge is not None:
            Merging([merge], {merge.name: {}}, None, session.num_layers).merge(model, session.base_weights)
        for p in model.parameters():  # not model.to(): buffers keep their precision
            p.data = p.data.to(compute)
        measured = measure(model, tokenizer, test, labels, shared)
        write_json(path_of(task, name, seed), facts | {"method": name} | measured)


def work(job: tuple[str, str, int], shared: Path, threads: int) -> None:
    """One cell in a process of its own, which gives all its memory back."""
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    try:
        run(*job, shared)
        print(f"{time.strftime('%H:%M:%S')} {job} {time.perf_counter() - start:.0f} s", flush=True)
    except Exception as e:  # one broken cell must not end the night
        print(f"{job} FAILED: {type(e).__name__}: {e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each: faster than one of two")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="run only cells whose task/method/seed name contains this")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    if args.what == "table":
        results_table.write(OUT, HERE.parent / "docs")
        return
    jobs = [j for j in wanted(args.seeds) if not path_of(*j).exists() and args.only in "/".join(map(str, j))]
    print(f"{len(jobs)} runs to do", flush=True)
    threads = max(1, (os.cpu_count() or 2) // args.workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, maxtasksperchild=1) as crew:
        crew.starmap(work, [(job, args.shared, threads) for job in jobs], chunksize=1)


if __name__ == "__main__":
    main()
