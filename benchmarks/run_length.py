"""What is kept after few and after many steps, at several learning rates. Resumable: one small JSON per run.

    python benchmarks/run_length.py base                                   # the base's scores, once
    python benchmarks/run_length.py run --steps 4 15 60 --factors 1 3      # trains what is missing
    python benchmarks/run_length.py run --tasks talk --steps 60            # the made conversations
    python benchmarks/run_length.py table                                  # prints the table

SST-2 from --shared (not shipped), or conversations made of the shipped tickets (leaderboard_talk.py), on
SmolLM2-135M-Instruct: the default plan and plain LoRA, the default rate times a factor, steps of 8 rows. Measured on
300 test rows (of the conversations 120, exact match) and the built-in held-out in-context tasks.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import leaderboard_cell
from leaderboard_plans import BATCH, DEFAULT, HERE, LIMIT, OUT

LENGTHS = (4, 15, 60, 250, 1000, 2000)
FACTORS = (1 / 3, 1.0, 3.0)
TASKS = ("sst2", "talk")
LENGTH = OUT / "length"
BASE = LENGTH / "base.json"


def plans() -> dict[str, list[Any]]:
    from holdfast import methods as M
    from holdfast.runs.job import default_plan

    return {
        "default": default_plan(),
        "lora": [M.LoRA()],
    }


def path_of(task: str, plan: str, steps: int, factor: float, seed: int) -> Path:
    return LENGTH / f"{task}.{plan.replace(' ', '_')}.{steps}.x{factor:.2g}.{seed}.json"


def digits(items: Any) -> str:
    return "".join(str(i["correct"]) for i in items)


def base(shared: Path) -> None:
    """Measure the untouched model; write what runs are compared with."""
    from holdfast import models
    from holdfast.files import write_json
    from holdfast.measure.suites.in_context import measure as in_context
    from holdfast.measure.tasks import held_out_tasks
    from holdfast.measure.tuned_task import score_task

    model, tokenizer = models.load("smollm2-135m")
    held = in_context(model, tokenizer, held_out_tasks(), limit=LIMIT)["tasks"]
    task: dict[str, str] = {}
    for name in TASKS:
        _, _, test, labels = leaderboard_cell.read(name, shared, tokenizer)
        task[name] = digits(score_task(model, tokenizer, test, labels or None))
    found = {"task": task, "held_out": {t["name"]: digits(t["items"]) for t in held}}
    LENGTH.mkdir(parents=True, exist_ok=True)
    write_json(BASE, found | {"chance": {t["name"]: t["chance"] for t in held}})


def run(task: str, plan: str, steps: int, factor: float, seed: int, shared: Path) -> None:
    """Train and measure one cell; write its JSON."""
    from holdfast import models
    from holdfast.files import write_json
    from holdfast.hosts.plain import Training, train
    from holdfast.measure.suites.in_context import measure as in_context
    from holdfast.measure.tasks import held_out_tasks
    from holdfast.measure.tuned_task import score_task
    from holdfast.plan import Host, Plan
    from holdfast.services import Context
    from holdfast.session import Session

    start, used = time.perf_counter(), time.process_time()
    model, tokenizer = models.load("smollm2-135m")
    dtype = model.dtype
    rows, tokens, test, labels = leaderboard_cell.read(task, shared, tokenizer)
    built = Plan(plans()[plan])
    ctx = Context(model, tokenizer, seed, rows, total_steps=steps, max_length=1024)
    built.check(Host("benchmark"), ctx)
    session = Session(built, model, ctx, compute_dtype=dtype, knows_rows=True)
    mix = session.mix(tokens)
    order = mix.draw(seed)
    session.prepare([next(order) for _ in range(steps * BATCH)])
    log = train(
        session, mix, Training(steps, BATCH, learning_rate=DEFAULT * factor, seed=seed, autocast=dtype, save_steps=0)
    )
    session.merge()
    tuned, _ = session.finished_model(dtype)
    held = in_context(tuned, tokenizer, held_out_tasks(), limit=LIMIT)
    found = {
        "data": task, "plan": plan, "steps": steps, "factor": factor, "seed": seed, "train_seconds": log.seconds,
        "task": digits(score_task(tuned, tokenizer, test, labels or None)),
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used, "tokens": log.tokens,
        "held_out": {t["name"]: digits(t["items"]) for t in held["tasks"]},
    }  # fmt: skip
    LENGTH.mkdir(parents=True, exist_ok=True)
    write_json(path_of(task, plan, steps, factor, seed), found)


def kept(found: dict[str, Any], before: dict[str, Any]) -> Any:
    """Retention with its interval, as docs/leaderboard.md has it."""
    from holdfast.measure import stats

    def marks(digits: str) -> list[float]:
        return [float(c) for c in digits]

    tasks = {n: (marks(before["held_out"][n]), marks(s), None) for n, s in found["held_out"].items()}
    chance = before["chance"]
    seen = {n: t for n, t in tasks.items() if stats.measurable(t[0], None, chance[n])}
    return stats.retention(seen, {n: chance[n] for n in seen})


def table() -> None:
    before = json.loads(BASE.read_text(encoding="utf-8"))
    for name in TASKS:
        print(f"{name}: the base has {before['task'][name].count('1') / len(before['task'][name]):.3f}")
    print("\n| data | plan | steps | rate | seed | task | in-context kept |\n|---|---|--:|--:|--:|--:|--:|")
    cells = [json.loads(p.read_text(encoding="utf-8")) for p in LENGTH.glob("*.*.*.json")]
    for f in sorted(cells, key=lambda f: (f["data"], f["plan"], f["factor"], f["steps"], f["seed"])):
        r, task = kept(f, before), f["task"].count("1") / len(f["task"])
        share = f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})"
        rate = f"x {f['factor']:.2g}"
        print(f"| {f['data']} | {f['plan']} | {f['steps']} | {rate} | {f['seed']} | {task:.3f} | {share} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "run", "table"))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--tasks", nargs="*", default=("sst2",), choices=TASKS)
    parser.add_argument("--plans", nargs="*", default=("default", "lora"))
    parser.add_argument("--steps", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--factors", nargs="*", type=float, default=FACTORS)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.what == "table":
        table()
        return
    if args.what == "base":
        base(args.shared)
        return
    for cell in product(args.tasks, sorted(args.steps), args.plans, args.factors, range(args.seeds)):
        task, steps, plan, factor, seed = cell
        if not path_of(task, plan, steps, factor, seed).exists():
            run(task, plan, steps, factor, seed, args.shared)
            print(path_of(task, plan, steps, factor, seed).name, flush=True)


if __name__ == "__main__":
    main()
