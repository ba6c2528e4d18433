"""Speed of this commit against an earlier one's, and TRL's beside both: what changed on a CPU.

    git worktree add --detach ../before COMMIT
    python benchmarks/since.py --before ../before    # writes benchmarks/results/since.json

A side is a process of its own that imports one commit's package and its own benchmarks/_common.py. Sides go in
lockstep, one step (or one task that is scored) each in turn, the same rows in the same step, while the others wait:
the speed of a virtual machine drifts by half within minutes, so a step is set against its neighbour of seconds ago.
Random weights of SmolLM2-135M's shape, shipped rows, one thread. Figures are medians of the ratios of steps, with
intervals that resample the steps; preparing and the first step are in `begin`, one figure a process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

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
    if job["trl"]:
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
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
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


def lockstep(trees: dict[str, Path], job: dict[str, Any]) -> dict[str, list[list[float]]]:
    """{side: [wall, CPU seconds of each step]}; the first step is preparing."""
    sides = {n: Side(tree, {**job, "trl": n == "TRL"}) for n, tree in trees.items()}
    found: dict[str, list[list[float]]] = {n: [] for n in sides}
    try:
        for n in range(job["steps"] + 1):
            for name in sides if n % 2 == 0 else reversed(sides):
                found[name].append(sides[name].step())
    finally:
        for side in sides.values():
            side.close()
    return found


def ratio(now: list[list[float]], other: list[list[float]], which: int) -> list[float]:
    """[median of the ratios of steps, and its 95 % interval]."""
    each = np.array([a[which] / b[which] for a, b in zip(now[1:], other[1:], strict=True)])
    drawn = np.random.default_rng(0).choice(each, (2000, len(each)))
    return [round(float(x), 4) for x in (np.median(each), *np.quantile(np.median(drawn, 1), (0.025, 0.975)))]


def measure(before: Path, model: str, steps: int, batch: int, only: str, out: Path) -> None:
    trees = {"now": HERE.parent, "before": before.resolve()}
    said = lambda tree: subprocess.check_output(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], text=True)  # noqa: E731
    record: C.Data = {"commits": {n: said(t).strip() for n, t in trees.items()}, "model": model, "cells": {}}
    for name, cell in CELLS.items():
        if only not in name:
            continue
        beside = {"TRL": HERE.parent} if cell.get("kind") and not cell.get("anchor") else {}
        found = lockstep({**trees, **beside}, {**cell, "model": model, "steps": steps, "batch": batch})
        others = [n for n in found if n != "now"]
        record["cells"][name] = {
            "step": {n: ratio(found["now"], found[n], 0) for n in others},
            "cpu": {n: ratio(found["now"], found[n], 1) for n in others},
            "begin": {n: round(found["now"][0][1] / found[n][0][1], 4) for n in others},
            "seconds": {n: [[round(x, 4) for x in step] for step in steps] for n, steps in found.items()},
        }
        print(name, {k: v for k, v in record["cells"][name].items() if k != "seconds"}, flush=True)
        C.keep(out, {**record, "facts": C.facts()})


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
        wall, cpu = ("{:.2f} ({:.2f} to {:.2f})".format(*cell[k]["before"]) for k in ("step", "cpu"))
        trl = f"{cell['step']['TRL'][0]:.2f}" if "TRL" in cell["step"] else ""
        lines.append(f"| {name} | {wall} | {cpu} | {cell['begin']['before']:.2f} | {trl} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a worktree of the earlier commit")
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--steps", type=int, default=24, help="of a side, beside the first")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--out", type=Path, default=C.RESULTS / "since.json")
    args = parser.parse_args()
    measure(args.before, args.model, args.steps, args.batch, args.only, args.out)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
