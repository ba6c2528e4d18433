"""What `holdfast repair` restores of plain tunings that lost in-context learning. Resumable: one JSON a repair.

    python benchmarks/repair.py run --shared ../shared/data       # tunes and repairs what is missing
    python benchmarks/repair.py table                             # prints the table of docs/repair.md

The tunings are those of `leaderboard.py`: 60 steps of 8 rows, all weights (2e-5) or LoRA (3e-4), no plan. A repair
gets the test rows of the task, which the tuning has not seen, and the bound in-context 0.95; it chooses on one half of
them and of the in-context items and reports on the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from leaderboard_cell import read
from leaderboard_plans import BATCH, FULL, HERE, LORA, OUT, STEPS, TASKS

BASE, KEEP = "smollm2-135m", 0.95
KINDS = {"full": FULL, "lora": LORA}
SEARCHES = {
    "default": (),
    "merges": ("WiSEFT", "LiNeS", "TIES"),  # the default before it healed
    "six": ("WiSEFT", "LiNeS", "TIES", "Breadcrumbs", "DARE", "SLERP"),
    "heal": ("heal",),
}
ORDER = [("sst2", 0), ("tickets", 0), ("sst2", 1), ("tickets", 1), ("rte", 0), ("agnews", 0)]


def wanted() -> list[tuple[str, str, int, str]]:
    """(task, kind, seed, search) in the order of need."""
    cells = [(t, k, s, search) for t, s in ORDER for search in ("default", "heal") for k in KINDS]
    return cells + [("sst2", k, 0, search) for search in ("six", "merges") for k in KINDS]


def path_of(task: str, kind: str, seed: int, search: str) -> Path:
    return OUT / "repair" / f"{task}.{kind}.{seed}.{search}.json"


def tuned(task: str, kind: str, seed: int, shared: Path, folder: Path) -> Path:
    """The folder of a plain tuning, made if it is missing."""
    from holdfast import methods as M
    from holdfast import models
    from holdfast.hosts.plain import Training, train
    from holdfast.plan import Host, Plan
    from holdfast.services import Context
    from holdfast.session import Session

    target = folder / f"{task}.{kind}.{seed}"
    if target.exists():
        return target
    model, tokenizer = models.load(BASE)
    compute = model.dtype
    if kind == "lora":  # an adapter must name a base that lies somewhere
        if not (folder / "base").exists():
            models.save_model(model, tokenizer, folder / "base", card=None)
        models.name_after(model, folder / "base")
    rows, tokens, *_ = read(task, shared, tokenizer)
    plan = Plan([M.LoRA()] if kind == "lora" else [])
    ctx = Context(model, tokenizer, seed, rows, total_steps=STEPS, max_length=1024)
    plan.check(Host("benchmark"), ctx)
    session = Session(plan, model, ctx, compute_dtype=compute, knows_rows=True)
    mix = session.mix(tokens)
    session.prepare()
    train(session, mix, Training(STEPS, BATCH, learning_rate=KINDS[kind], seed=seed, autocast=compute, save_steps=0))
    model, _ = session.finished_model(compute)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(target)
    return target


def run(task: str, kind: str, seed: int, search: str, shared: Path, folder: Path, limit: int | None) -> None:
    """One repair, with its time on the clock. Measurements of another repair that are in the cache cost nothing."""
    import _common as C
    from holdfast.files import write_json
    from holdfast.verbs.repair import repair

    model, data = tuned(task, kind, seed, shared, folder), str(shared / f"text/{task}/test.jsonl")
    if task == "tickets":
        data = "holdfast:tickets/test.jsonl"
    out = folder / "repaired" / path_of(task, kind, seed, search).stem
    wish: dict[str, Any] = {"methods": SEARCHES[search]} if SEARCHES[search] else {}
    start, cpu = time.perf_counter(), time.process_time()
    report = repair(BASE, str(model), out, data=data, keep={"in-context": KEEP}, limit=limit, **TASKS[task], **wish)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    target = path_of(task, kind, seed, search)
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = {k: report[k] for k in ("status", "sentence", "met", "chosen", "points", "report", "keep")}
    write_json(target, {"facts": C.facts(), "load": os.getloadavg()[1], **spent, "limit": limit, **kept})


# ---- the table


def _row(path: Path) -> str:
    task, kind, seed, search = path.stem.split(".")
    r = json.loads(path.read_text(encoding="utf-8"))
    sides, unit = r["report"]["task"], r["report"]["task"]["metric"]
    kept = {side: next(a["retention"] for a in r["report"][side] if a["name"] == "in-context")
            for side in ("tuned", "repaired")}  # fmt: skip
    scores = [f"{sides[s]['value']:.3f}" for s in ("base", "tuned", "repaired")]
    shares = [f"{k['value']:.2f} ({k['low']:.2f} to {k['high']:.2f})" for k in kept.values()]
    cells = [f"{task}, {kind}, seed {seed}", search, r["chosen"]["label"], *scores, *shares, r["status"],
             f"{r['seconds'] / 60:.1f}"]  # fmt: skip
    return f"| {' | '.join(cells)} |" if unit else ""


def table() -> str:
    head = ["tuning", "search", "chosen", "task: base", "tuned", "repaired", "in-context kept: tuned", "repaired",
            "verdict", "minutes"]  # fmt: skip
    found = [path_of(*cell) for cell in wanted()]
    rows = [_row(p) for p in found if p.exists()]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "repair", help="where the models are kept")
    parser.add_argument("--only", default="", help="run only cells whose name contains this")
    parser.add_argument("--limit", type=int, help="items of each in-context task; None: all")
    args = parser.parse_args()
    if args.what == "table":
        print(table())
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for cell in wanted():
        name = path_of(*cell).stem
        if not path_of(*cell).exists() and args.only in name:
            print(name, flush=True)
            run(*cell, args.shared, args.work, args.limit)


if __name__ == "__main__":
    main()
