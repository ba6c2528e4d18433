"""What `holdfast repair` restores of plain tunings that lost in-context learning. Resumable: one JSON a repair.

    python benchmarks/repair.py run --shared ../shared/data       # tunes and repairs what is missing
    python benchmarks/repair.py table                             # writes the tables of docs/repair.md
    python benchmarks/repair.py picture sst2.full.0.six           # docs/repair.png: the page of a repair that was run

The tunings are those of `leaderboard.py`: 60 steps of 8 rows, all weights (2e-5) or LoRA (3e-4; on RTE and AG News
1e-3, the best rate of plain LoRA on SST-2), no plan. A repair gets the test rows of the task, which the tuning has
not seen, and the bound in-context 0.95 (`heal` 0.97, `own` 0.9); it chooses on one half of them and of the in-context
items and reports on the other. The searches `own` get no rows: their task is closeness to the tuned model's answers to
prompts that it draws. Afterwards all test rows of the task, which they have not seen, are scored too (`beyond`).
`soup` gets the tunings of three seeds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import repair_table
from leaderboard_cell import Lab, Material, read, train_methods
from leaderboard_cells import Cell
from leaderboard_plans import FULL, HERE, LORA, OUT, TASKS

BASE, KEEP = "smollm2-135m", 0.95
LARGE, ROWS = 1000, 400  # of a test set with more rows so many are drawn
KINDS = {"full": FULL, "lora": LORA}
FASTER = {("rte", "lora"): 1e-3, ("agnews", "lora"): 1e-3}
SEARCHES = {
    "default": (),
    "merges": ("WiSEFT", "LiNeS", "TIES"),  # the default before it healed
    "six": ("WiSEFT", "LiNeS", "TIES", "Breadcrumbs", "DARE", "SLERP"),
    "graft": ("graft", "SkillGraft"),
    "heal": ("heal",),
    "own": ("heal",),
    "soup": ("WiSEFT",),
}
KEPT = {"heal": 0.97, "own": 0.9}  # what is asked of them; of the others KEEP
ORDER = [("sst2", 0), ("tickets", 0), ("sst2", 1), ("tickets", 1), ("rte", 0), ("agnews", 0)]


def wanted() -> list[tuple[str, str, int, str]]:
    """(task, kind, seed, search) in the order of need."""
    cells = [(t, k, s, search) for t, s in ORDER for search in ("heal", "own", "default") for k in KINDS]
    more = [(t, "lora", 0, "six") for t in ("sst2", "tickets")]
    return [*more, *cells, *(("sst2", "full", 0, search) for search in ("six", "merges", "graft", "soup"))]


def path_of(task: str, kind: str, seed: int, search: str) -> Path:
    return OUT / "repair" / f"{task}.{kind}.{seed}.{search}.json"


def tuned(task: str, kind: str, seed: int, shared: Path, folder: Path) -> Path:
    """The folder of a plain tuning, made if it is missing."""
    from holdfast import methods as M
    from holdfast import models

    target = folder / f"{task}.{kind}.{seed}"
    if target.exists():
        return target
    if kind == "lora" and not (folder / "base").exists():  # an adapter must name a base that lies somewhere
        models.save_model(*models.load(BASE), folder / "base", card=None)
    model, tokenizer = models.load(BASE)
    if kind == "lora":
        models.name_after(model, folder / "base")
    rows, tokens, *_ = read(task, shared, tokenizer)
    methods = [M.LoRA()] if kind == "lora" else []
    return trained(target, model, tokenizer, rows, tokens, methods, rate_of(task, kind), seed)


def trained(
    target: Path,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    tokens: Sequence[Any],
    methods: Sequence[Any],
    rate: float,
    seed: int,
) -> Path:
    """Train `model` under a plan of these methods and write it to `target`; returns that."""
    cell, material = Cell(target.name, "", rate, seed), Material(rows, tokens, (), (), ())
    model = train_methods(methods, cell, Lab(Path()), model, tokenizer, material).model
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(target)
    return target


def rate_of(task: str, kind: str) -> float:
    return FASTER.get((task, kind), KINDS[kind])


def data_of(task: str, shared: Path, folder: Path) -> str:
    """The test rows: of a large set so many, drawn."""
    if task == "tickets":
        return "holdfast:tickets/test.jsonl"
    whole, part = shared / f"text/{task}/test.jsonl", folder / f"{task}.jsonl"
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) <= LARGE:
        return str(whole)
    part.write_text("".join(random.Random(0).sample(lines, ROWS)), encoding="utf-8")
    return str(part)


def run(task: str, kind: str, seed: int, search: str, shared: Path, folder: Path, limit: int | None) -> None:
    """One repair, with its time on the clock. Measurements of another repair that are in the cache cost nothing."""
    import _common as C
    from holdfast.verbs.repair import repair

    model, data = tuned(task, kind, seed, shared, folder), data_of(task, shared, folder)
    out = folder / "repaired" / path_of(task, kind, seed, search).stem
    wish: dict[str, Any] = {"methods": SEARCHES[search]} if SEARCHES[search] else {}
    if search != "own":
        wish |= {"data": data, **TASKS[task]}
    if search == "soup":
        wish["also"] = [str(tuned(task, kind, n, shared, folder)) for n in (0, 1, 2) if n != seed]
    start, cpu, clock = time.perf_counter(), time.process_time(), Clock()
    keep = {"in-context": KEPT.get(search, KEEP)}
    report = repair(BASE, str(model), out, keep=keep, limit=limit, tell=clock.tell, **wish)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    found = {"facts": C.facts(), "load": os.getloadavg()[1], **spent, "limit": limit}
    found |= {"phases": clock.phases(), "rate": rate_of(task, kind)}
    if search == "own":
        found["beyond"] = beyond(task, data, {"tuned": str(model), "repaired": report["model"]})
    repair_table.keep(path_of(task, kind, seed, search), {**found, **report})


class Clock:
    """Seconds of each phase of a repair: from the first that is told of it to the first of the next one."""

    def __init__(self) -> None:
        self._told: list[tuple[str, float]] = []

    def tell(self, phase: str, share: float, words: str) -> None:
        if not self._told or self._told[-1][0] != phase:
            self._told.append((phase, time.perf_counter()))

    def phases(self) -> dict[str, float]:
        ends = [*(at for _, at in self._told[1:]), time.perf_counter()]
        found: dict[str, float] = {}
        for (phase, start), end in zip(self._told, ends, strict=True):
            found[phase] = found.get(phase, 0.0) + end - start
        return {phase: round(seconds, 1) for phase, seconds in found.items()}


def beyond(task: str, data: str, named: Mapping[str, str]) -> dict[str, Any]:
    """The task's score of models on all test rows."""
    from holdfast import models
    from holdfast.engine import BATCH_TOKENS
    from holdfast.measure.parts import COARSE, FINE, REPORT
    from holdfast.runs.repair_goal import from_data

    found: dict[str, Any] = {}
    for name, path in {"base": BASE, **named}.items():
        model, tokenizer = models.load(path, merge_adapter=True)
        goal = from_data(data, **TASKS[task], metric=None, tokenizer=tokenizer, batch_tokens=BATCH_TOKENS)
        items = [i for part in (COARSE, FINE, REPORT) for i in goal.score(model, part)]
        found[name] = goal.estimates(items, items)["after"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "picture"))
    parser.add_argument("name", nargs="?", default="", help="of the repair whose page is pictured")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "repair", help="where the models are kept")
    parser.add_argument("--only", default="", help="run only cells whose name contains this")
    parser.add_argument("--limit", type=int, help="items of each in-context task; None: all")
    args = parser.parse_args()
    if args.what == "table":
        repair_table.write_page(HERE.parent / "docs" / "repair.md", OUT / "repair")
        return
    if args.what == "picture":
        repair_table.picture(args.work / "repaired" / args.name / "repair.html", HERE.parent / "docs" / "repair.png")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for cell in wanted():
        name = path_of(*cell).stem
        if not path_of(*cell).exists() and args.only in name:
            print(name, flush=True)
            run(*cell, args.shared, args.work, args.limit)


if __name__ == "__main__":
    main()
