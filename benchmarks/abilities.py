"""Every ability after tuning on four tasks, with items enough to see a loss. Resumable: a small file a run.

    python benchmarks/abilities.py run --minutes 60                      # what is missing; starts no run later
    python benchmarks/abilities.py run --tasks rte --plans default
    python benchmarks/abilities.py table                                 # into docs/budget.md

The default plan and plain LoRA train as cells of the leaderboard do, on SST-2, RTE, AG News and conversations, and are
asked every suite that a 135M model can answer. Limits are those at which a true loss of 5 points is called "lost" with
probability 0.8 (docs/suites.md), or all that a suite has. Nothing is healed or taken back: this is the plan itself,
without its budget. Verdicts are those of `holdfast check` over all abilities of a run, at a floor of 0.95.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import repair_table
from leaderboard_cell import Lab, Material, made, material, train_methods
from leaderboard_cells import Cell, Data, clock_after, in_turn, options
from leaderboard_plans import DEFAULT, HERE, OUT
from leaderboard_table import NAMES

FOLDER, PAGE = OUT / "abilities", HERE.parent / "docs" / "budget.md"
TASKS = ("sst2", "rte", "agnews", "talk")
RATES = {"default": DEFAULT, "lora": 1e-3}  # of LoRA the best known by task score (docs/leaderboard.md)
FLOOR = 0.95
SUITES = {  # items of each task; None: the suite's own number
    "in-context": None,
    "language": None,
    "knowledge": 378,
    "instructions": 54,
    "format": 60,
    "reasoning": None,
    "safety": 50,
    "copying": None,
    "recognition": None,
    "calibration": None,
}


class Bench:
    """What all runs share."""

    def __init__(self, lab: Lab):
        from holdfast import models
        from holdfast.files import content_key

        self.lab = lab
        self.base, self.tokenizer = models.load(lab.model)
        source = models.resolve(lab.model)
        self.key = content_key(models.fingerprint(source), str(self.base.dtype), self.base.device.type)
        self._rows: dict[str, Material] = {}

    def rows(self, task: str) -> Material:
        if task not in self._rows:
            self._rows[task] = material(task, self.lab, self.tokenizer)
        return self._rows[task]

    def asked(self, model: Any, labels: Sequence[str], key: str | None = None) -> list[Data]:
        """Every suite; the base's answers are kept in the cache of measurements."""
        from holdfast.measure.suites import measure_suite

        def one(name: str) -> Data:
            limit = SUITES[name]
            return measure_suite(name, lambda: model, self.tokenizer, limit=limit, labels=labels, cache_key=key)

        return [one(name) for name in SUITES]

    def task(self, model: Any, rows: Material) -> float:
        from holdfast.measure.tuned_task import score_task

        return fmean(i["correct"] for i in score_task(model, self.tokenizer, rows.test, rows.labels or None))

    def run(self, cell: Cell) -> Data:
        from holdfast.measure.compare import abilities
        from leaderboard_plans import plans

        start, rows, methods = time.perf_counter(), self.rows(cell.task), plans()[cell.method][0]
        before, begun = self.asked(self.base, rows.labels, self.key), time.perf_counter()
        trained = train_methods(methods, cell, self.lab, copy.deepcopy(self.base), self.tokenizer, rows)
        seconds = time.perf_counter() - begun
        found = abilities(before, self.asked(trained.model, rows.labels), {}, FLOOR)
        items = {b["suite"]: sum(len(t["items"]) for t in b["tasks"]) for b in before}
        return {
            "task": cell.task,
            "method": cell.method,
            "rate": cell.rate,
            "seed": cell.seed,
            "plan": f"{methods}",
            "steps": self.lab.size.steps,
            "value": [self.task(m, rows) for m in (self.base, trained.model)],
            "abilities": [
                {"items": items[a["name"]], **{k: a[k] for k in ("name", "before", "after", "retention", "status")}}
                for a in found
            ],
            "cost": {"train_seconds": round(seconds, 1), "seconds": round(time.perf_counter() - start, 1)},
            "made": made(),
        }


def records(folder: Path) -> list[Data]:
    """Every run, in the order of the tasks and plans."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*/*.json")]
    return sorted(found, key=lambda r: (TASKS.index(r["task"]), [*RATES].index(r["method"]), r["seed"]))


def table(found: Sequence[Data]) -> Iterator[str]:
    """Lines of the table; bold what is shown lost."""
    yield "| task | plan | seed | before, after | " + " | ".join(SUITES) + " |"
    yield "|---|---|--:|---|" + "---|" * len(SUITES)
    for run in found:
        parts = {a["name"]: _kept(a) for a in run["abilities"]}
        value = ", ".join(f"{v:.3f}" for v in run["value"])
        kept = " | ".join(parts[name] for name in SUITES)
        yield f"| {NAMES[run['task']]} | {run['method']} | {run['seed']} | {value} | {kept} |"
    yield ""
    yield from _said(found)


def _kept(part: Data) -> str:
    kept = part["retention"]
    if not kept:
        return "not measurable"
    words = f"{kept['value']:.2f} ({kept['low']:.2f} to {kept['high']:.2f})"
    return f"**{words}**" if part["status"] == "lost" else words


def _said(found: Sequence[Data]) -> Iterator[str]:
    """What the runs of each plan come to."""
    for plan in RATES:
        parts = [a for run in found if run["method"] == plan for a in run["abilities"] if a["retention"]]
        if not parts:
            continue
        lost = sum(a["status"] == "lost" for a in parts)
        below = sum(a["retention"]["value"] < FLOOR for a in parts)
        least = min(parts, key=lambda a: a["retention"]["value"])
        runs = sum(run["method"] == plan for run in found)
        yield (
            f"{plan}: {runs} runs, {len(parts)} abilities of them measurable; {lost} shown lost, {below} with an "
            f"estimate below {FLOOR}; the lowest is {least['name']}, {_kept(least).strip('*')}."
        )
        yield ""
    sizes = {a["name"]: a["items"] for run in found for a in run["abilities"]}
    yield f"Items: {', '.join(f'{name} {n}' for name, n in sizes.items())}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, "table", FOLDER, "text/<task>")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--plans", nargs="*", default=[*RATES], choices=[*RATES])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args(argv)
    if args.what == "table":
        repair_table.put(PAGE, "abilities.py", {"abilities": [*table(records(args.folder))]})
        return 0
    until = clock_after(args.minutes)
    wanted = [
        Cell(task, plan, RATES[plan], seed) for seed in range(args.seeds) for plan in args.plans for task in args.tasks
    ]
    todo = [cell for cell in wanted if not (args.folder / cell.file).is_file()]
    print(f"{len(todo)} runs are missing.", flush=True)
    if not todo:
        return 0
    bench = Bench(Lab(args.shared, args.model))
    runs = ((str(c), args.folder / c.file, partial(bench.run, c)) for c in todo)
    failed = in_turn(runs, until)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
