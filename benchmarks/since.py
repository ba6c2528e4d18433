"""Speed of this commit against an earlier one's, and TRL's beside both: what changed on a CPU.

    git worktree add --detach ../before COMMIT
    python benchmarks/since.py --before ../before    # writes benchmarks/results/since.json
    python benchmarks/since.py --before . --only "large pages" --out benchmarks/results/pages.json

A side is a process of its own that imports one commit's package and its own benchmarks/_common.py. Sides go in
lockstep, one step (or one task that is scored) each in turn, the same rows in the same step, while the others wait:
the speed of a virtual machine drifts by half within minutes, so a step is set against its neighbour of seconds ago.
One commit in two processes differs by up to a tenth (where its memory lies, which core it is on): every cell has
several lots of fresh processes. Random weights of the shape of SmolLM2-135M, shipped rows, one thread. Geometric
means over lots of the median ratio of steps, with intervals that resample lots and steps; preparing and the first
step are in `begin`. A last row sets this commit against itself: what the method itself cannot tell.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

import _common as C

HERE = Path(__file__).parent
CELLS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "data": "medium", "trl": True},
    "lora, short rows": {"kind": "lora", "data": "short", "trl": True},
    "full": {"kind": "full", "data": "medium", "trl": True},
    "default plan": {"kind": "lora", "data": "medium", "anchor": True},
    "scoring": {"items": 24},
    "lora, this commit against itself": {"kind": "lora", "data": "medium", "itself": True},
    "lora, large pages against itself": {"kind": "lora", "data": "medium", "itself": True, "pages": True},
    "full, large pages against itself": {"kind": "full", "data": "medium", "itself": True, "pages": True},
}
# glibc 2.35 or later asks Linux for pages of 2 MB, in one heap, and keeps what was freed; the Makefile says the same
TUNABLES = ("hugetlb=1", "mmap_max=0", "arena_max=1", "trim_threshold=8000000000", "top_pad=67108864")
PAGES = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{t}" for t in TUNABLES)}
NOTE = (
    "Processes in lockstep, a step each in turn; 95 % intervals over lots of fresh processes and their steps. The "
    "side that starts first is slower, also against itself (1.07, 0.96 to 1.22, in three lots of one order), so lots "
    "begin with each in turn."
)
CHILD = """
import json, sys, time
import _common as C
job = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
model, tokenizer = C.load(job["model"])
def clocks():
    return time.perf_counter(), time.process_time()
since = None
def turn(*_):
    # what was done since the last turn; then the others' turns pass
    global since
    if since is not None:
        print(json.dumps([b - a for a, b in zip(since, clocks())]), flush=True)
    sys.stdin.readline()
    since = clocks()
C.Clock.stamp = turn
if "items" in job:
    from holdfast.measure.probe import Ask
    from holdfast.measure.scorer import Scorer
    from holdfast.measure.suites import build
    tasks = {}
    for p in build("in-context", Ask(tokenizer, limit=job["items"])).probes:
        tasks.setdefault(p.task, []).append((p.context, p.answers[0]))
    with torch.inference_mode():
        turn()
        Scorer(model, tokenizer).score([pair for pairs in tasks.values() for pair in pairs[:1]])
        for n in range(job["steps"]):
            turn()
            Scorer(model, tokenizer).score(list(tasks.values())[n % len(tasks)])
        turn()
else:
    from holdfast.methods import ICLAnchor
    rows = C.rows_of(job["data"], None, tokenizer)
    asked = C.Job(rows, job["steps"] + 1, job["batch"], job["kind"])
    turn()
    if job["peer"]:
        plain = {"gradient_checkpointing": False, "padding_free": True, "max_length": None}
        C.trl(C.fresh(model), tokenizer, asked, plain)
    else:
        C.ours(C.fresh(model), tokenizer, asked, [ICLAnchor()] if job.get("anchor") else [])
"""


class Side:
    """A process that does one step when it is told to."""

    def __init__(self, tree: Path, job: dict[str, Any]):
        folder = tree / "benchmarks"
        paths = os.pathsep.join(map(str, (tree / "src", folder)))
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **job.get("env", {})}
        command = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(job)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=env, cwd=folder, text=True, **pipes)  # type: ignore[call-overload]

    def step(self) -> list[float]:
        """Wall and CPU seconds of the next step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("["):
                return json.loads(line)
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()}.")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def lockstep(trees: dict[str, Path], job: dict[str, Any], lot: int) -> dict[str, list[list[float]]]:
    """{side: [wall, CPU seconds of each step]}; the first step is preparing.

    The side that is started first takes some 5 % longer, also against itself, so lots begin with each in turn.
    """
    order = list(trees) if lot % 2 == 0 else list(reversed(trees))
    env = {"now": PAGES} if job.get("pages") else {}
    sides = {n: Side(trees[n], {**job, "peer": n == "TRL", "env": env.get(n, {})}) for n in order}
    found: dict[str, list[list[float]]] = {n: [] for n in sides}
    try:
        for n in range(job["steps"] + 1):
            for name in sides if n % 2 == 0 else reversed(sides):
                found[name].append(sides[name].step())
    finally:
        for side in sides.values():
            side.close()
    return found


def ratio(lots: list[dict[str, list[list[float]]]], other: str, which: int) -> list[float]:
    """[geometric mean over lots of the median ratio of steps, and its 95 % interval]."""
    each = [np.log([a[which] / b[which] for a, b in zip(f["now"][1:], f[other][1:], strict=True)]) for f in lots]
    draw = np.random.default_rng(0)
    again = [
        np.mean([np.median(draw.choice(each[n], len(each[n]))) for n in draw.integers(len(each), size=len(each))])
        for _ in range(2000)
    ]
    middle = np.mean([np.median(one) for one in each])
    return [round(float(np.exp(x)), 4) for x in (middle, *np.quantile(again, (0.025, 0.975)))]


def measure(before: Path, model: str, steps: int, lots: int, batch: int, only: str, peer: bool, out: Path) -> None:
    said = lambda tree: subprocess.check_output(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], text=True)  # noqa: E731
    commits = {n: said(tree).strip() for n, tree in (("now", HERE.parent), ("before", before))}
    record: C.Data = {"commits": commits, "model": model, "cells": {}}
    for name, cell in CELLS.items():
        if only not in name:
            continue
        trees = {"now": HERE.parent, "before": HERE.parent if cell.get("itself") else before.resolve()}
        beside = {"TRL": HERE.parent} if cell.get("trl") and peer else {}
        job = {**cell, "model": model, "steps": steps, "batch": batch}
        found = [lockstep({**trees, **beside}, job, lot) for lot in range(lots)]
        others = [n for n in found[0] if n != "now"]
        begin = {n: [f["now"][0][1] / f[n][0][1] for f in found] for n in others}
        record["cells"][name] = {
            "step": {n: ratio(found, n, 0) for n in others},
            "cpu": {n: ratio(found, n, 1) for n in others},
            "begin": {n: round(geometric_mean(each), 4) for n, each in begin.items()},
            "seconds": [{n: [[round(x, 3) for x in s] for s in steps] for n, steps in f.items()} for f in found],
        }
        print(name, {k: v for k, v in record["cells"][name].items() if k != "seconds"}, flush=True)
        C.keep(out, {**record, "facts": C.facts()})


def spans(cell: C.Data) -> tuple[str, str]:
    """What a step takes of the other side's time and of its CPU seconds, in words."""
    wall, cpu = ("{:.2f} ({:.2f} to {:.2f})".format(*cell[k]["before"]) for k in ("step", "cpu"))
    return wall, cpu


def table(path: Path) -> list[str]:
    """Markdown lines; none without data."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    old = d["commits"]["before"]
    lines = [
        f"| {d['commits']['now']} | a step, {old} = 1 | its CPU seconds | those of preparing | a step, TRL's = 1 |",
        "|---|---|---|---|---|",
    ]
    for name, cell in d["cells"].items():
        wall, cpu = spans(cell)
        trl = f"{cell['step']['TRL'][0]:.2f}" if "TRL" in cell["step"] else ""
        lines.append(f"| {name} | {wall} | {cpu} | {cell['begin']['before']:.2f} | {trl} |")
    return [*lines, "", NOTE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a worktree of the earlier commit")
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--steps", type=int, default=12, help="of a process, beside the first")
    parser.add_argument("--lots", type=int, default=4, help="of fresh processes; an even number")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--alone", action="store_true", help="without TRL")
    parser.add_argument("--out", type=Path, default=C.RESULTS / "since.json")
    args = parser.parse_args()
    measure(args.before, args.model, args.steps, args.lots, args.batch, args.only, not args.alone, args.out)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
