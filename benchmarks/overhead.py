"""Training time of each plan relative to plain tuning: steps of all plans alternate in one process on a quiet machine.

    python benchmarks/overhead.py --data tickets                          # into benchmarks/results/overhead.json
    python benchmarks/overhead.py --data sst2 --shared ../shared/data --only lora default

A cycle runs one block of steps of every plan on the same rows; the ratio is that of median step times, and a plan's
one-off work (base answers, SVDs) is spread over the steps of a run of `leaderboard_plans.STEPS` steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def timed(name: str, methods: list[Any], tokens: Any, rows: Any, steps: int, run_steps: int) -> tuple[float, float]:
    """(mean seconds of a step, seconds of one-off work for a whole run)."""
    import _common
    from holdfast import models

    model, tokenizer = models.load("smollm2-135m")
    job = _common.Job(tokens, steps, 8, "full")  # an adapter is one of `methods`
    block = _common.ours(model, tokenizer, job, methods, text=rows, run_steps=run_steps)
    _common.tidy()
    return statistics.mean(block.seconds), block.prepare_seconds


def main() -> None:
    import torch

    import leaderboard_cell
    import leaderboard_plans

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=tuple(leaderboard_plans.TASKS), default="tickets")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=None)
    args = parser.parse_args()
    from holdfast import models

    tokenizer = models.load("smollm2-135m")[1]
    rows, tokens, _, _ = leaderboard_cell.read(args.data, args.shared, tokenizer)
    wanted = {n: m for n, (m, _) in leaderboard_plans.plans().items()}
    if args.only:
        wanted = {n: m for n, m in wanted.items() if n in args.only}
    seen: dict[str, list[float]] = {n: [] for n in wanted}
    for cycle in range(args.cycles):
        for name, methods in wanted.items():
            step, once = timed(name, methods, tokens, rows, args.steps, leaderboard_plans.STEPS)
            seen[name].append(step + once / leaderboard_plans.STEPS)
            print(cycle, name, f"{step:.3f} s a step, {once:.1f} s once", flush=True)
    middle = {n: statistics.median(t) for n, t in seen.items()}
    against = {n: middle["lora" if any(m.name == "LoRA" for m in ms) else "full"] for n, ms in wanted.items()}
    path = HERE / "results" / "overhead.json"
    out = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = out.get(args.data, {})
    out[args.data] = {  # what is not measured now stays, against its own baseline
        "ratio": {**before.get("ratio", {}), **{n: middle[n] / against[n] for n in wanted}},
        "seconds": {**before.get("seconds", {}), **seen},
        "note": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.data}, "
        f"{args.cycles} cycles of {args.steps} steps.",
    }
    path.write_text(json.dumps(out, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
