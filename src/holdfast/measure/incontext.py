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

from holdfast.errors import HoldfastError
from holdfast.fewshot import Format, Pair, Prompt, build, formats_for
from holdfast.measure.scorer import Scorer
from holdfast.measure.tasks import Task

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


def measure(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    num_fewshot: int = 8,
    limit: int | None = 48,
    formats: Sequence[str] | None = None,
    seed: int = 0,
    batch_tokens: int = 512,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Score `tasks`; returns the measurement as plain data (see `report.schema`), items in a fixed order."""
    items = [
        item
        for task in tasks
        for item in items_of(
            task, tokenizer=tokenizer, num_fewshot=num_fewshot, limit=limit, formats=formats, seed=seed
        )
    ]
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, progress=progress)
    encoded = [scorer.encode((i.prompt.context, i.prompt.answer + i.prompt.stop)) for i in items]
    longest = max(len(ids) for ids, _ in encoded)
    if longest >= scorer.max_length:  # lm_eval would silently drop shots from the left
        raise HoldfastError(
            f"The in-context suite at {num_fewshot} shots needs {longest} tokens, the model reads "
            f"{scorer.max_length}.",
            "Ask for fewer shots (num_fewshot).",
        )
    scores = scorer.score_tokens(encoded)
    by_task: dict[str, list[dict[str, Any]]] = {t.name: [] for t in tasks}
    for item, score in zip(items, scores, strict=True):
        by_task[item.task].append(
            {"id": item.id, "cluster": item.cluster, "correct": int(score.greedy), "logprob": score.logprob}
        )
    return {
        "suite": "in-context",
        "num_fewshot": num_fewshot,
        "limit": limit,
        "seed": seed,
        "num_unique_tokens": scorer.num_unique_tokens,
        "tasks": [
            {
                "name": t.name,
                "version": t.version,
                "chance": t.chance,
                "metric": "exact",
                "items": by_task[t.name],
            }
            for t in tasks
        ],
    }
