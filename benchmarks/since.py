"""Speed of this commit against an earlier one's, and TRL's beside both: what changed on a CPU.

    git worktree add --detach ../before COMMIT
    python benchmarks/since.py --before ../before    # writes benchmarks/results/since.json

Every block is a process of its own that imports one commit's package and its own benchmarks/_common.py; blocks of all
sides alternate. Random weights of SmolLM2-135M's shape, shipped rows, one thread. Wall seconds are medians of steps;
CPU seconds of the whole run, preparing included, change less when the machine has other work. Ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import _common as C

HERE = Path(__file__).parent
CELLS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "data": "medium"},
    "lora, short rows": {"kind": "lora", "data": "short"},
    "full": {"kind": "full", "data": "medium"},
    "default plan": {"kind": "lora", "data": "medium", "anchor": True},
    "scoring": {"items": 24},
}
CHILD = """
import json, statistics, sys, time
import _common as C
job = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
model, tokenizer = C.load(job["model"])
def spent(work):
    wall, cpu = time.perf_counter(), time.process_time()
    out = work()
    return out, time.perf_counter() - wall, time.process_time() - cpu
if "items" in job:
    from holdfast.measure.probe import Ask
    from holdfast.measure.scorer import Scorer
    from holdfast.measure.suites import build
    pairs = [(p.context, p.answers[0]) for p in build("in-context", Ask(tokenizer, limit=job["items"])).probes]
    with torch.inference_mode():
        Scorer(model, tokenizer).score(pairs[:4])
        found, wall, cpu = spent(lambda: Scorer(model, tokenizer).score(pairs))
    out = {"step": wall, "cpu": cpu, "check": sum(s.logprob for s in found)}
else:
    from holdfast.methods import ICLAnchor
    rows = C.rows_of(job["data"], None, tokenizer)
    def run(steps):
        asked = C.Job(rows, steps, job["batch"], job["kind"])
        if job["trl"]:
            plain = {"gradient_checkpointing": False, "padding_free": True, "max_length": None}
            return C.trl(C.fresh(model), tokenizer, asked, plain)
        return C.ours(C.fresh(model), tokenizer, asked, [ICLAnchor()] if job.get("anchor") else [])
    run(2)
    block, wall, cpu = spent(lambda: run(job["steps"]))
    out = {"step": statistics.median(block.seconds), "cpu": cpu, "check": block.loss[-1]}
print(json.dumps(out))
"""


def block(tree: Path, job: dict[str, Any]) -> dict[str, float]:
    """One block of the commit that is checked out in `tree`."""
    folder = tree / "benchmarks"
    paths = os.pathsep.join(map(str, (tree / "src", folder)))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(job)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {job} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(before: Path, model: str, steps: int, batch: int, cycles: int, only: str) -> C.Data:
    trees = {"now": HERE.parent, "before": before.resolve()}
    said = lambda tree: subprocess.check_output(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], text=True)  # noqa: E731
    out: C.Data = {"commits": {n: said(t).strip() for n, t in trees.items()}, "model": model, "cells": {}}
    for name, cell in CELLS.items():
        if only not in name:
            continue
        sides = [*trees, *(["TRL"] if cell.get("kind") and not cell.get("anchor") else [])]
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for n in range(cycles):
            for side in sides if n % 2 == 0 else reversed(sides):
                job = {**cell, "model": model, "steps": steps, "batch": batch, "trl": side == "TRL"}
                found[side].append(block(trees.get(side, HERE.parent), job))
                print(name, side, found[side][-1], flush=True)
        middle = {s: {k: statistics.median(b[k] for b in bs) for k in ("step", "cpu")} for s, bs in found.items()}
        ratio = {s: {k: middle["now"][k] / m[k] for k in m} for s, m in middle.items() if s != "now"}
        out["cells"][name] = {"ratio": ratio, "blocks": found}
        print(name, ratio, flush=True)
    return {**out, "facts": C.facts()}


def table(path: Path) -> list[str]:
    """Markdown lines; none without data."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"| {d['commits']['now']} | step, {d['commits']['before']} = 1 | CPU seconds, the same | step, TRL's = 1 |",
        "|---|---|---|---|",
    ]
    for name, cell in d["cells"].items():
        old, trl = cell["ratio"]["before"], cell["ratio"].get("TRL")
        beside = f"{trl['step']:.2f}" if trl else ""
        lines.append(f"| {name} | {old['step']:.2f} | {old['cpu']:.2f} | {beside} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a worktree of the earlier commit")
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--steps", type=int, default=9, help="of a block; the first is not timed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=4)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--out", type=Path, default=C.RESULTS / "since.json")
    args = parser.parse_args()
    C.keep(args.out, measure(args.before, args.model, args.steps, args.batch, args.cycles, args.only))
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
