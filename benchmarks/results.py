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
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "results"
STEPS, BATCH, LIMIT, SHARED_LIMIT = 60, 8, 24, 30
TEST = {"tickets": 180, "sst2": 300, "rte": 180, "agnews": 180}  # long rows cost more
TASKS = {
    "tickets": {"prompt": "{text}\nQueue:", "completion": " {queue}"},
    "sst2": {"prompt": "{sentence}\nLabel:", "completion": " {label}"},
    "rte": {"prompt": "{sentence}\nLabel:", "completion": " {label}"},
    "agnews": {"prompt": "{sentence}\nTopic:", "completion": " {label}"},
}
FULL, LORA, DEFAULT = 2e-5, 3e-4, 1.5e-3


def plans() -> dict[str, tuple[list[Any], float]]:
    """name -> (methods, learning rate)."""
    from holdfast import methods as M
    from holdfast.verbs.tune import default_plan

    anchor = M.ICLAnchor(weight=1.0, gold=0.0)  # the KL alone
    return {
        "default": (default_plan(), DEFAULT),
        "full": ([], FULL),
        "full lr 1e-5": ([], 1e-5),
        "full lr 5e-5": ([], 5e-5),
        "full lr 1e-4": ([], 1e-4),
        "lora": ([M.LoRA()], LORA),
        "lora lr 1e-4": ([M.LoRA()], 1e-4),
        "lora lr 1e-3": ([M.LoRA()], 1e-3),
        "lora lr 3e-3": ([M.LoRA()], 3e-3),
        "lora + replay": ([M.LoRA(), M.Replay()], LORA),
        "in-context mix": ([M.InContextMix()], FULL),
        "half fine-tuning": ([M.HalfFineTune()], FULL),
        "promot": ([M.ProMoT()], FULL),
        "l2 to init": ([M.L2ToInit()], FULL),
        "kl to base (task)": ([M.KLToBase()], FULL),
        "anchor (weight 1), full": ([anchor], FULL),
        "anchor (weight 1), lora": ([M.LoRA(), anchor], LORA),
        "orthogonal subspace": ([M.OrthogonalSubspace()], FULL),
        "anchor (weight 1), lora lr 1e-3": ([M.LoRA(), anchor], 1e-3),
        "anchor (weight 1), full lr 5e-5": ([anchor], 5e-5),
    }


AFTERWARDS = ("wise-ft", "lines")  # closed-form merges of the "full" run: no training of their own
TABLE = [
    "base",
    "default",
    "full",
    "lora",
    "lora lr 1e-3",
    "lora + replay",
    "in-context mix",
    "half fine-tuning",
    "promot",
    "l2 to init",
    "kl to base (task)",
    "anchor (weight 1), full",
    "anchor (weight 1), lora",
    "orthogonal subspace",
    *AFTERWARDS,
]


SWEEP = {  # learning rates beside 2e-5 (full) and 3e-4 and 1e-3 (LoRA); tickets need higher ones in 60 steps
    "sst2": (
        "full lr 1e-5",
        "full lr 5e-5",
        "lora lr 1e-4",
        "anchor (weight 1), lora lr 1e-3",
        "anchor (weight 1), full lr 5e-5",
    ),
    "tickets": ("full lr 5e-5", "full lr 1e-4", "lora lr 3e-3"),
}


CLOSE = ("in-context mix", "promot", "anchor (weight 1), lora", "kl to base (task)")  # kept the most with one seed
TOP = ("full lr 1e-4", "lora lr 3e-3")  # of the sweep, the rates that compete for the best plain run


def wanted(seeds: int) -> list[tuple[str, str, int]]:
    """(task, method, seed) in the order of need."""
    core = ("default", "lora lr 1e-3", "full", "lora")
    rest = [n for n in plans() if " lr " not in n and n not in core]
    rest.sort(key=lambda n: n not in CLOSE)
    order = [(t, "base", 0) for t in TASKS]
    order += [(t, n, 0) for n in core for t in SWEEP]
    order += [(t, n, 0) for t, names in SWEEP.items() for n in names]
    order += [(t, n, 1) for n in core for t in SWEEP if seeds > 1]
    order += [(t, n, 1) for t, names in SWEEP.items() for n in names if n in TOP and seeds > 1]
    order += [(t, n, 0) for n in core[:3] for t in ("rte", "agnews")]
    order += [(t, n, 0) for n in rest for t in SWEEP]
    return order + [(t, n, s) for s in range(1, seeds) for n in (*core, *rest) for t in SWEEP if s > 1 or n in rest]


def path_of(task: str, method: str, seed: int) -> Path:
    return OUT / f"{task}.{method.replace(' ', '_').replace(',', '').replace('(', '').replace(')', '')}.{seed}.json"


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

    model, tokenizer = models.load("smollm2-135m")
    compute = model.dtype
    rows, tokens, test, labels = read(task, shared, tokenizer)
    facts = {"data": task, "method": method, "seed": seed, "steps": STEPS, "batch": BATCH, "dtype": str(compute)}
    if method == "base":
        write_json(path_of(task, method, seed), facts | measure(model, tokenizer, test, labels, shared))
        return
    methods, lr = plans()[method]
    merges = {"wise-ft": M.WiSEFT(), "lines": M.LiNeS()} if method == "full" else {}
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
                base = session.base_weights[n].float()
                p.copy_(kept[n] if merge is None else merge.merge(n, base, kept[n].float(), session.num_layers))
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
        import results_table

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
    sys.path.insert(0, str(HERE))
    main()
