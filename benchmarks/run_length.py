"""What is kept after few and after many steps, at several learning rates. Resumable: one small JSON per run.

    python benchmarks/run_length.py run --steps 4 15 60 --factors 1 3      # trains what is missing
    python benchmarks/run_length.py table                                  # prints the table

SST-2 from --shared (not shipped), on SmolLM2-135M-Instruct: the default plan and plain LoRA, the default rate times a
factor, steps of 8 rows. Measured on 300 test rows and the built-in held-out in-context tasks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import leaderboard_cell
from leaderboard_cells import BASE, BEFORE, Cell, scores_of
from leaderboard_plans import BATCH, DEFAULT, FOLDER, HERE, LIMIT, OUT

LENGTHS = (4, 15, 60, 250, 1000, 2000)
FACTORS = (1 / 3, 1.0, 3.0)
LENGTH = OUT / "length"


def plans() -> dict[str, list[Any]]:
    from holdfast import methods as M
    from holdfast.runs.job import default_plan

    return {
        "default": default_plan(),
        "lora": [M.LoRA()],
    }


def path_of(plan: str, steps: int, factor: float, seed: int) -> Path:
    return LENGTH / f"sst2.{plan.replace(' ', '_')}.{steps}.x{factor:.2g}.{seed}.json"


def base() -> dict[str, Any]:
    """The base's answers, which the leaderboard keeps."""
    found = json.loads((FOLDER / BEFORE / Cell("sst2", BASE).file).read_text(encoding="utf-8"))
    return {"held_out": scores_of(found, "in-context"), "chance": found["chance"]["in-context"]}


def run(plan: str, steps: int, factor: float, seed: int, shared: Path) -> None:
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

    start = time.perf_counter()
    model, tokenizer = models.load("smollm2-135m")
    dtype = model.dtype
    rows, tokens, test, labels = leaderboard_cell.read("sst2", shared, tokenizer)
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
        "plan": plan, "steps": steps, "factor": factor, "seed": seed, "train_seconds": log.seconds,
        "seconds": time.perf_counter() - start, "tokens": log.tokens,
        "task": "".join(str(i["correct"]) for i in score_task(tuned, tokenizer, test, labels)),
        "held_out": {t["name"]: "".join(str(i["correct"]) for i in t["items"]) for t in held["tasks"]},
    }  # fmt: skip
    LENGTH.mkdir(parents=True, exist_ok=True)
    write_json(path_of(plan, steps, factor, seed), found)


def kept(found: dict[str, Any], before: dict[str, Any]) -> Any:
    """Retention with its interval, as docs/leaderboard.md has it."""
    from holdfast.measure import stats

    tasks = {n: (before["held_out"][n], [int(c) for c in s], None) for n, s in found["held_out"].items()}
    chance = before["chance"]
    seen = {n: t for n, t in tasks.items() if stats.measurable(t[0], None, chance[n])}
    return stats.retention(seen, {n: chance[n] for n in seen})


def table() -> None:
    before = base()
    print("| plan | steps | rate | seed | task | in-context kept |\n|---|--:|--:|--:|--:|--:|")
    cells = [json.loads(p.read_text(encoding="utf-8")) for p in LENGTH.glob("*.json")]
    for f in sorted(cells, key=lambda f: (f["plan"], f["factor"], f["steps"], f["seed"])):
        r, task = kept(f, before), f["task"].count("1") / len(f["task"])
        share = f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})"
        print(f"| {f['plan']} | {f['steps']} | x {f['factor']:.2g} | {f['seed']} | {task:.3f} | {share} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--plans", nargs="*", default=("default", "lora"))
    parser.add_argument("--steps", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--factors", nargs="*", type=float, default=FACTORS)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.what == "table":
        table()
        return
    for steps in sorted(args.steps):
        for plan in args.plans:
            for factor in args.factors:
                for seed in range(args.seeds):
                    if not path_of(plan, steps, factor, seed).exists():
                        run(plan, steps, factor, seed, args.shared)
                        print(path_of(plan, steps, factor, seed).name, flush=True)


if __name__ == "__main__":
    main()
