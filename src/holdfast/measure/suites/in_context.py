"""The in-context suite: how well a model learns new tasks from examples in its prompt.

Every task is asked in several formats. All items of one (task, format) share their demonstrations, so the scorer
computes them once; base and tuned see the same text, so every difference is paired. An item is right when the greedy
first line is exactly the answer, which needs no generation: every answer token and the newline after it is the argmax.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.data.fewshot import Format, Pair, Prompt, build, formats_for
from holdfast.engine import BATCH_TOKENS
from holdfast.errors import HoldfastError
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.tasks import Task, anchor_tasks, held_out_tasks

LIMIT = 48  # items of each task
NUM_FORMATS = 3  # formats per task; more would cost a shared prefix each


@dataclass(frozen=True)
class Item:
    """One question: `cluster` names the demonstrations it shares with others."""

    task: str
    id: str
    cluster: str
    prompt: Prompt


def shuffled(key: str, items: Sequence[Any]) -> list[Any]:
    """A shuffle that depends on `key` alone, the same on every machine and Python."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    out = list(items)
    random.Random(seed).shuffle(out)
    return out


def pick_shots(pool: Sequence[Pair], labels: Sequence[str] | None, k: int, key: str) -> list[Pair]:
    """Draw k demonstrations; with a closed label set every label appears about equally often."""
    if not labels:
        return shuffled(key, pool)[:k]
    by_label = {y: shuffled(f"{key}/{y}", [p for p in pool if p[1] == y]) for y in labels}
    rounds = [p for n in range(k) for y in labels for p in by_label[y][n : n + 1]]
    return shuffled(key + "/order", rounds[:k])


def items_of(
    task: Task,
    *,
    tokenizer: Any,
    num_fewshot: int = 8,
    limit: int | None = 48,
    formats: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Item]:
    """The questions of one task, the first `limit` of a fixed shuffle, spread evenly over its formats.

    A smaller `limit` asks a subset of the same questions of each format.
    """
    forms: list[Format] = formats_for(tokenizer, formats)
    if formats is None:
        forms = shuffled(task.name, forms)[:NUM_FORMATS]
    order: list[Pair] = shuffled(f"{task.name}/{seed}", task.items)
    pool, asked = order[: max(8 * len(forms), num_fewshot)], order[max(8 * len(forms), num_fewshot) :]
    if len(pool) < num_fewshot or not asked:
        raise HoldfastError(
            f"Task {task.name!r} has {len(task.items)} items: too few for {num_fewshot} shots.",
            "Ask for fewer shots (num_fewshot).",
        )
    out = []
    for n, query in enumerate(asked[:limit]):
        form = forms[n % len(forms)]
        shots = pick_shots(pool, task.labels, num_fewshot, f"{task.name}/{form.name}/{seed}")
        prompt = build(form, shots, query, instruction=task.instruction, names=task.names, tokenizer=tokenizer)
        out.append(Item(task.name, f"{task.name}/{n}", f"{task.name}/{form.name}", prompt))
    return out


def suite_of(tasks: Sequence[Task], ask: Ask, formats: Sequence[str] | None = None, name: str = "in-context") -> Suite:
    """`tasks` as a suite, items in a fixed order."""
    limit = ask.limit or LIMIT
    items = [
        item
        for task in tasks
        for item in items_of(
            task, tokenizer=ask.tokenizer, num_fewshot=ask.num_fewshot, limit=limit, formats=formats, seed=ask.seed
        )
    ]
    return Suite(
        name,
        tuple(Group(t.name, t.version, t.chance, "exact") for t in tasks),
        tuple(
            Probe(i.task, i.id, "exact", i.prompt.context, (i.prompt.answer + i.prompt.stop,), cluster=i.cluster)
            for i in items
        ),
        {"num_fewshot": ask.num_fewshot, "limit": limit, "seed": ask.seed},
    )


def build_suite(ask: Ask) -> Suite:
    """The held-out tasks: what `in-context` measures."""
    return suite_of(held_out_tasks(), ask)


def build_anchors(ask: Ask) -> Suite:
    """The anchor tasks, which a plan may have trained on: how well the anchors themselves are kept."""
    return suite_of(anchor_tasks(), ask, name="anchors")


def measure(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    num_fewshot: int = 8,
    limit: int | None = LIMIT,
    formats: Sequence[str] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Score some tasks by hand; returns what `score_suite` returns."""
    suite = suite_of(tasks, Ask(tokenizer, num_fewshot, limit, seed), formats)
    return score_suite(model, tokenizer, suite, batch_tokens=batch_tokens, progress=progress)
