"""Which true loss do the suites `tools` and `thinking` show? Simulated with the verdict of `holdfast check` itself.

    python benchmarks/suite_power.py [--reps 200]

Every item of the base is right with a probability; the tuned model loses `loss` points of items and further changes
marks both ways, so that DISCORDANT of them change. Printed: the share of repetitions called "lost", by loss.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from holdfast.measure.compare import ability
from holdfast.measure.sight import DISCORDANT

KEEP = 0.95
LOSSES = (0.0, 0.05, 0.08, 0.10, 0.12)
BASES = (0.9,)
SHAPES = {"tools": (2, 60, 1 / 3), "thinking": (1, 80, 0.5)}  # tasks, items of each, chance


def measured(name: str, tasks: list[np.ndarray], chance: float) -> dict[str, Any]:
    """Marks by task in the shape of `score_suite`."""
    about = {"version": 1, "chance": chance, "metric": "right", "clustered": False}
    items = [
        [{"id": str(n), "cluster": "", "correct": float(x), "marks": {}} for n, x in enumerate(marks)]
        for marks in tasks
    ]
    return {"suite": name, "tasks": [{"name": str(t), "items": i, **about} for t, i in enumerate(items)]}


def drawn(base: float, loss: float, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Marks of base and tuned, (tasks, items) each."""
    gained = min(max(0.0, (DISCORDANT - loss) / 2), 1 - base)
    chances = (base - gained - loss, gained + loss, gained, 1 - base - gained)  # 11, 10, 01, 00
    cells = rng.choice(4, size=shape, p=chances)
    return cells < 2, cells % 2 == 0


def found(name: str, base: float, loss: float, reps: int, rng: np.random.Generator) -> float:
    """The share of repetitions in which the suite is called lost."""
    tasks, items, chance = SHAPES[name]
    hits = 0
    for _ in range(reps):
        before, after = (measured(name, list(x), chance) for x in drawn(base, loss, (tasks, items), rng))
        hits += ability(before, after, KEEP)["status"] == "lost"
    return hits / reps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=200)
    reps, rng = parser.parse_args().reps, np.random.default_rng(0)
    print("suite     base  " + "  ".join(f"{100 * x:4.0f}" for x in LOSSES) + "   points lost")
    for name in SHAPES:
        for base in BASES:
            shares = [found(name, base, loss, reps, rng) for loss in LOSSES]
            print(f"{name:9} {base:.2f}  " + "  ".join(f"{x:4.2f}" for x in shares), flush=True)


if __name__ == "__main__":
    main()
