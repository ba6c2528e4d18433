"""How often `tune --keep` keeps its promise, and what it costs. Resumable: one JSON of a few kilobytes a run.

    python benchmarks/budget.py run --shared ../shared/data     # trains what is missing
    python benchmarks/budget.py table                           # prints a table

The default plan on SmolLM2-135M-Instruct, 60 steps of 8 rows: the shipped tickets, and SST-2, RTE and AG News from
--shared (not shipped), three seeds each, under in-context 0.97. The bound chooses on one half of the items and on
validation rows; what stands here are the other half and test rows. A bound holds where the estimate of the other half
meets it. `times` is the time of the whole run over that of its training and four measurements of a half (base and
tuned model on all items), which a user who measures by hand would pay as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from leaderboard_plans import BATCH, HERE, OUT, STEPS, TASKS

KEEP = {"in-context": 0.97}
LIMIT, SEEDS = 32, (0, 1, 2)
FOLDER = OUT / "budget"


def path_of(task: str, seed: int) -> Path:
    return FOLDER / f"{task}.{seed}.json"


def recipe(task: str, seed: int, shared: Path, out: Path) -> dict[str, Any]:
    own = task == "tickets"
    where = "holdfast:tickets/" if own else str(shared / f"text/{task}") + "/"
    return {
        "model": {"model_name_or_path": "smollm2-135m"},
        "data": {
            "train": f"{where}train.jsonl",
            "test": f"{where}test.jsonl",
            **({"validation": f"{where}validation.jsonl"} if own else {"validation_size": 200}),
            "too_long": "drop",
            "max_length": 200,
            "test_size": 300,
            **TASKS[task],
        },
        "training": {
            "output_dir": str(out),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "seed": seed,
        },
        "measure": {"suites": ["in-context"], "keep": KEEP, "limit": LIMIT, "budget": True},
        "export": {"merge": False},
    }


def run(task: str, seed: int, shared: Path, work: Path) -> None:
    """One `tune`, its report in short."""
    import _common as C
    from holdfast import tune
    from holdfast.files import write_json
    from holdfast.recipe import recipe_from

    out = work / f"{task}.{seed}"
    start = time.perf_counter()
    tune(recipe_from(recipe(task, seed, shared, out)))
    seconds = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    training = json.loads((out / "training.json").read_text(encoding="utf-8"))
    budget = training["budget"]
    points = [{k: p[k] for k in ("share", "meets", "margin")} for p in budget["points"]]
    found = {
        "facts": C.facts(),
        "load": os.getloadavg()[1],
        "seconds": seconds,
        "timing": report["timing"],
        "budget": {"share": budget["share"], "met": budget["met"], "points": points},
        "task": {side: report["task"][side] for side in ("before", "after")},
        "kept": {a["name"]: {"status": a["status"], **a["retention"]} for a in report["abilities"]},
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(path_of(task, seed), found)
    shutil.rmtree(out)


def _row(path: Path) -> tuple[bool, str]:
    """(whether every bound holds on the reporting half, a line of the table)."""
    f = json.loads(path.read_text(encoding="utf-8"))
    task, seed = path.stem.split(".")
    holds = all(f["kept"][name]["value"] >= floor for name, floor in KEEP.items())
    shown = [f"{k['value']:.2f} ({k['low']:.2f} to {k['high']:.2f}), {k['status']}" for k in f["kept"].values()]
    score, clock = f["task"]["after"], f["timing"]
    usual = clock["tune"] + 4 * clock["measure after"]
    cells = [task, seed, f"{score['value']:.3f} ({score['low']:.2f} to {score['high']:.2f})", *shown,
             "yes" if holds else "no", f"{f['budget']['share']:.0%}", f"{f['seconds'] / usual:.2f}"]  # fmt: skip
    return holds, f"| {' | '.join(cells)} |"


def table() -> str:
    found = [_row(path_of(task, seed)) for task in TASKS for seed in SEEDS if path_of(task, seed).exists()]
    head = ["task", "seed", "accuracy", *(f"{name} kept" for name in KEEP), "holds", "of the change", "times"]
    said = f"The bound holds on the reporting half in {sum(holds for holds, _ in found)} of {len(found)} runs."
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(row for _, row in found), "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "budget")
    parser.add_argument("--only", default="", help="run only cells whose name contains this")
    args = parser.parse_args()
    if args.what == "table":
        print(table())
        return
    for seed in SEEDS:
        for task in TASKS:
            if not path_of(task, seed).exists() and args.only in path_of(task, seed).stem:
                run(task, seed, args.shared, args.work)
                print(path_of(task, seed).stem, flush=True)


if __name__ == "__main__":
    main()
