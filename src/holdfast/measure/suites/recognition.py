"""The recognition suite: does a model recognise a task it knows, or learn a new one from the demonstrations?

Each task is asked three times, with the same demonstrations and the same questions but other labels:

    true      the right labels
    random    demonstrations with labels that say nothing of the input; the right answer stays the true label.
              What is right here comes from what the model knew: task recognition.
    abstract  every label is replaced by a letter, the same one throughout, in demonstrations and answers. No prior
              tells which: what is right here comes from the demonstrations: task learning.

Source: Pan et al. 2023 (arXiv 2305.09731; Gold, Random, Abstract), after Min et al. 2022 (2202.12837). Ours: random
labels are balanced and agree with the truth as often as chance, since a single draw of few may teach right or wrong;
the letters are drawn once a task and seed, so that all questions share one prompt.

Every prompt shows 16 demonstrations, whatever `num_fewshot` is: at Pan's 8 a task of four labels shows two of each,
and SmolLM2-135M learned little from them (abstract labels 0.09 above chance; with 16, 0.22; seed 0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from holdfast.data.fewshot import FORMATS, Pair, build, stop_of
from holdfast.errors import HoldfastError
from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.in_context import pick_shots, shuffled

DATA = Path(__file__).parent / "data" / "recognition.json"
SHOTS = 16
LIMIT = 36  # questions of each task under each condition, all there are
FORM = FORMATS["arrow"]  # no word of it hints at the task, as Pan's minimal template
SYMBOLS = ("F", "R", "T", "V")  # no label begins with one of them
CONDITIONS = ("true", "random", "abstract")
TRIES = 64  # draws of random labels, the one nearest to chance is taken


@dataclass(frozen=True)
class Labelled:
    """One task: as many inputs of every label."""

    name: str
    labels: tuple[str, ...]
    items: Mapping[str, tuple[str, ...]]


@lru_cache(maxsize=1)
def labelled_tasks() -> tuple[int, tuple[Labelled, ...]]:
    """(version of the data, its tasks)."""
    raw = json.loads(DATA.read_text(encoding="utf-8"))
    tasks = [
        Labelled(t["name"], tuple(t["items"]), {y: tuple(x) for y, x in t["items"].items()}) for t in raw["tasks"]
    ]
    return raw["version"], tuple(tasks)


def halves(task: Labelled, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs to show, pairs to ask): half of each label; the asked ones take turns by label."""
    by_label = {y: [(x, y) for x in shuffled(f"{task.name}/{y}/{seed}", task.items[y])] for y in task.labels}
    shown = [p for pairs in by_label.values() for p in pairs[: len(pairs) // 2]]
    asked = [pairs[len(pairs) // 2 :] for pairs in by_label.values()]
    return shown, [p for turn in zip(*asked, strict=True) for p in turn]


def random_labels(shots: Sequence[Pair], labels: Sequence[str], key: str) -> list[Pair]:
    """`shots` with balanced labels that agree with the true ones as nearly at chance as their number allows."""
    spread = (shuffled(key, labels) * len(shots))[: len(shots)]
    draws = [shuffled(f"{key}/{n}", spread) for n in range(TRIES)]

    def distance(draw: Sequence[str]) -> float:
        agree = sum(new == y for new, (_, y) in zip(draw, shots, strict=True))
        return abs(agree - len(shots) / len(labels))

    return [(x, new) for (x, _), new in zip(shots, min(draws, key=distance), strict=True)]


def relabelled(
    condition: str, shots: Sequence[Pair], labels: Sequence[str], key: str
) -> tuple[list[Pair], dict[str, str]]:
    """(demonstrations of a condition, true label -> the one to answer with)."""
    same = {y: y for y in labels}
    if condition == "random":
        return random_labels(shots, labels, key), same
    if condition == "true":
        return list(shots), same
    symbols = dict(zip(labels, shuffled(key, SYMBOLS), strict=False))
    return [(x, symbols[y]) for x, y in shots], symbols


def group_name(task: str, condition: str) -> str:
    """What a task is called under a condition."""
    return f"{task}, {condition} labels"


def probes_of(task: Labelled, condition: str, ask: Ask, limit: int) -> list[Probe]:
    """The questions of one task under one condition, all behind the same demonstrations."""
    key = f"{task.name}/{ask.seed}"
    shown, asked = halves(task, ask.seed)
    shots, answer = relabelled(condition, pick_shots(shown, task.labels, SHOTS, key), task.labels, key)
    name, end = group_name(task.name, condition), stop_of(FORM, ask.tokenizer)
    answers = tuple(FORM.answer.format(y=answer[y]) + end for y in task.labels)
    return [
        Probe(
            name,
            f"{name}/{n}",
            "choice",
            build(FORM, shots, (x, answer[y]), tokenizer=ask.tokenizer).context,
            answers,
            right=task.labels.index(y),
            cluster=name,
        )
        for n, (x, y) in enumerate(asked[:limit])
    ]


def build_suite(ask: Ask) -> Suite:
    """Every task under every condition."""
    limit = ask.limit or LIMIT
    version, tasks = labelled_tasks()
    pairs = [(t, c) for t in tasks for c in CONDITIONS]
    groups = tuple(Group(group_name(t.name, c), version, 1 / len(t.labels), "choice") for t, c in pairs)
    probes = tuple(p for t, c in pairs for p in probes_of(t, c, ask, limit))
    settings = {"num_fewshot": SHOTS, "limit": limit, "seed": ask.seed}
    return Suite("recognition", groups, probes, settings)


def split(measured: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy above chance, mean over the tasks: "true" labels, "recognition" (random), "learning" (abstract).

    Args:
        measured: what `score_suite` returns for this suite.

    Raises:
        HoldfastError: it is a measurement of another suite.
    """
    if measured.get("suite") != "recognition":
        raise HoldfastError(
            f"Recognition and learning are told apart by the suite 'recognition', not {measured.get('suite')!r}.",
            "Measure the suite 'recognition'.",
        )
    parts = {"recognition": "random", "learning": "abstract", "true": "true"}
    return {part: _above_chance(measured["tasks"], condition) for part, condition in parts.items()}


def _above_chance(tasks: Sequence[Mapping[str, Any]], condition: str) -> float:
    mine = [t for t in tasks if t["name"].endswith(group_name("", condition))]
    return sum(sum(i["correct"] for i in t["items"]) / len(t["items"]) - t["chance"] for t in mine) / len(mine)
