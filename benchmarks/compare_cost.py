"""What a comparison costs beside as many runs of `tune`: CPU seconds, each side from an empty cache.

    python benchmarks/compare_cost.py --shared ../shared/data            # writes results/compare_cost.json
    python benchmarks/compare_cost.py --methods LoRA LoRA+Replay --seeds 2 --steps 15

Both sides train every plan with every seed on SST-2 at one learning rate. `tune` is a process a run: with
`--keep none`, as `compare` takes nothing back either, and with the budget that every `tune` has. The runs of one side
share a cache of measurements, as on a user's machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import budget
from leaderboard_plans import BATCH, HERE, OUT

TARGET = OUT / "compare_cost.json"
METHODS = ("default", "LoRA", "LoRA+Replay", "plain")
KINDS = ("tune --keep none", "tune")


def recipe(args: argparse.Namespace, folder: Path) -> Path:
    found = {
        "model": {"model_name_or_path": "smollm2-135m"},
        "data": budget.Cell("sst2", "plain", args.steps, 1.0, 0).data(args.shared.resolve(), folder),
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": args.steps,
            "per_device_train_batch_size": BATCH,
            "data_seed": 0,
        },
        "measure": {"suites": ["in-context"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(found), encoding="utf-8")  # JSON is YAML
    return path


def spent(*command: str, home: Path) -> dict[str, float]:
    """Wall and CPU seconds of one command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**os.environ, "HOLDFAST_HOME": str(home)}
    done = subprocess.run([sys.executable, "-m", "holdfast", *command], env=env, stdout=subprocess.DEVNULL)
    assert done.returncode in (0, 1), command  # 1: something was lost
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def plan_of(name: str) -> str:
    """A plan as `--set plan=` takes it."""
    return {"default": "null", "plain": "[]"}.get(name, json.dumps(name.split("+")))


def tunes(args: argparse.Namespace, folder: Path, kept: bool) -> list[dict[str, float]]:
    """Each plan with each seed, one `tune` after the other, with a budget or without."""
    path, runs = recipe(args, folder), []
    for name in args.methods:
        for seed in range(args.seeds):
            sets = [
                f"plan={plan_of(name)}",
                f"training.seed={seed}",
                f"training.output_dir={folder / f'{name}.{seed}'}",
            ]
            told = [word for one in sets for word in ("--set", one)]
            keep = [] if kept else ["--keep", "none"]
            runs.append(spent("tune", str(path), *keep, *told, home=folder / "home"))
            print(f"{KINDS[kept]} {name}, seed {seed}: {runs[-1]['cpu_seconds']:.0f} s", flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    import _common as C
    from holdfast.files import write_json

    found: dict[str, Any] = {"facts": C.facts(), "methods": args.methods, "seeds": args.seeds, "steps": args.steps}
    with tempfile.TemporaryDirectory() as one:
        words = ["--methods", ",".join(args.methods), "--seeds", str(args.seeds), "--factor", "1"]
        out = ["--out", str(Path(one) / "out")]
        together = spent("compare", str(recipe(args, Path(one))), *words, *out, home=Path(one) / "home")
        print(f"compare: {together['cpu_seconds']:.0f} s", flush=True)
    found["compare"] = together
    for kept, kind in enumerate(KINDS):
        with tempfile.TemporaryDirectory() as other:
            runs = tunes(args, Path(other), bool(kept))
        apart = {key: sum(r[key] for r in runs) for key in runs[0]}
        ratio = {key: together[key] / apart[key] for key in apart}
        found[kind] = {"all": apart, "each": runs, "ratio": ratio}
        write_json(TARGET, found)
        print(f"{ratio['cpu_seconds']:.2f} of {len(runs)} runs of {kind}", flush=True)


if __name__ == "__main__":
    main()
