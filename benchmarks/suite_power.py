"""Which true loss does each suite show? Simulated with the verdict of `holdfast check` itself.

    python benchmarks/suite_power.py [--reps 200] [--suites tools thinking]

Every item of the base is right with a probability; the tuned model loses `loss` points of items and further changes
marks both ways, so that DISCORDANT of them change. Items of one cluster (phrasings of a fact, probes of a sequence)
change together, which is the worst that can be. Printed: the share of repetitions called "lost", at 0 and 5 points.
Suites whose scores are graded (language, calibration, copying) need a model's scores and are not here. Nor is a base
that is right in nearly all items of a task without chance: there 5 points are hardly 5 % of it, and at a floor of 0.95
that is no loss to be called so.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import numpy as np

from _common import RESULTS
from holdfast.files import write_json
from holdfast.measure.compare import ability
from holdfast.measure.probe import Ask, Suite
from holdfast.measure.sight import DISCORDANT
from holdfast.measure.suites import build
from holdfast.models.loading import load_tokenizer
from holdfast.models.source import resolve

KEEP = 0.95
LOSSES = (0.0, 0.05)
BASES = {"tools": 0.9, "thinking": 0.9}  # of the others 0.6
LIMITS: dict[str, tuple[int | None, ...]] = {  # None is the default
    "in-context": (None,),
    "format": (None, 60),
    "knowledge": (None, 378),
    "instructions": (None, 54),
    "reasoning": (None,),
    "safety": (None, 50),
    "recognition": (None,),
    "tools": (None,),
    "thinking": (None,),
}
SWITCH = "{% if enable_thinking %}Think.{% endif %}"


def suite_of(name: str, limit: int | None, tokenizer: Any) -> Suite:
    """The suite as it is asked of a model that has labels to forget, tools to call and thoughts to switch off."""
    return build(name, Ask(tokenizer, limit=limit, labels=("positive", "negative")))


def shape_of(suite: Suite) -> dict[str, list[tuple[str, str]]]:
    """The id and the cluster of each item, by task."""
    out: dict[str, list[tuple[str, str]]] = {group.name: [] for group in suite.groups}
    for probe in suite.probes:
        out[probe.task].append((probe.id, probe.cluster or probe.id))
    return out


def measured(suite: Suite, shape: dict[str, list[tuple[str, str]]], marks: dict[str, np.ndarray]) -> dict[str, Any]:
    """Marks by task in the shape of `score_suite`."""
    tasks = []
    for group in suite.groups:
        about = {"version": 1, "chance": group.chance, "metric": "right", "clustered": group.clustered}
        items = [
            {"id": name, "cluster": cluster, "correct": float(mark), "marks": {}}
            for (name, cluster), mark in zip(shape[group.name], marks[group.name], strict=True)
        ]
        tasks.append({"name": group.name, "items": items, **about})
    return {"suite": suite.name, "tasks": tasks}


def drawn(
    base: float, loss: float, items: list[tuple[str, str]], apart: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Marks of base and tuned of one task, (items,) each; apart: items of a cluster change on their own."""
    names = [name if apart else cluster for name, cluster in items]
    places = {name: n for n, name in enumerate(dict.fromkeys(names))}
    gained = min(max(0.0, (DISCORDANT - loss) / 2), 1 - base)
    chances = (base - gained - loss, gained + loss, gained, 1 - base - gained)  # 11, 10, 01, 00
    cells = rng.choice(4, size=len(places), p=chances)[[places[name] for name in names]]
    return cells < 2, cells % 2 == 0


def lost(suite: Suite, base: float, loss: float, reps: int, rng: np.random.Generator) -> float:
    """The share of repetitions in which the suite is called lost."""
    hits, shape = 0, shape_of(suite)
    apart = {group.name: not group.clustered for group in suite.groups}
    for _ in range(reps):
        pairs = {name: drawn(base, loss, items, apart[name], rng) for name, items in shape.items()}
        before, after = (measured(suite, shape, {name: pair[k] for name, pair in pairs.items()}) for k in (0, 1))
        hits += ability(before, after, KEEP)["status"] == "lost"
    return hits / reps


def row_of(name: str, limit: int | None, tokenizer: Any, reps: int, rng: np.random.Generator) -> dict[str, Any]:
    suite, base = suite_of(name, limit, tokenizer), BASES.get(name, 0.6)
    sizes = Counter(probe.kind for probe in suite.probes)
    found = {f"{100 * loss:.0f}": lost(suite, base, loss, reps, rng) for loss in LOSSES}
    about = {"suite": name, "limit": limit, "items": len(suite.probes), "written": sizes["generate"], "base": base}
    return {**about, "lost": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=200)
    parser.add_argument("--suites", nargs="*", default=list(LIMITS), choices=list(LIMITS))
    args = parser.parse_args()
    tokenizer = load_tokenizer(resolve("smollm2-135m"), trust_remote_code=False)
    tokenizer.chat_template += SWITCH
    print("| suite | limit | items | of them written | base right | lost at 0 points | at 5 points |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    rows = []
    for name in args.suites:
        for limit in LIMITS[name]:
            rng = np.random.default_rng(0)
            r = row_of(name, limit, tokenizer, args.reps, rng)
            rows.append(r)
            head = f"| {name} | {limit or 'default'} | {r['items']} | {r['written']} | {r['base']:.1f} |"
            print(f"{head} {r['lost']['0']:.2f} | {r['lost']['5']:.2f} |", flush=True)
    if args.suites == list(LIMITS):
        write_json(RESULTS / "suite_power.json", {"reps": args.reps, "rows": rows})


if __name__ == "__main__":
    main()
