"""The calibration suite: does a model know when it is right?

Every answer set is closed, and its probabilities are scored. The score of an item is 1 - Brier / 2 (kind
"calibrated"): unlike accuracy it falls when a tuned model becomes sure of wrong answers. The suite has no data of its
own. "multiple choice" asks the questions of `knowledge` again; "labels" asks the held-out in-context tasks that have
a closed label set, with their demonstrations.

Probabilities are those of the answer texts, normalised over the closed set. `summary` adds the calibration error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.stats import ece
from holdfast.measure.suites import knowledge
from holdfast.measure.suites.in_context import Item, items_of
from holdfast.measure.tasks import Task, held_out_tasks

LIMIT = 96  # items of each task
LABELS = "labels"


def uniform_score(k: int) -> float:
    """Score of equal probabilities for k answers: their Brier score is 1 - 1/k."""
    return 1 - (1 - 1 / k) / 2


def build_suite(ask: Ask) -> Suite:
    """Both tasks; the questions are the first of those that `knowledge` asks with this seed."""
    limit = ask.limit or LIMIT
    asked = knowledge.choice_probes(knowledge.order(ask.seed), limit, kind="calibrated")
    labelled = _labelled(ask, limit)
    version = sum(t.version for t in _tasks())  # grows whenever one of the tasks does
    return Suite(
        "calibration",
        (
            Group(knowledge.CHOICE, knowledge.version(), _chance(asked), "1 - Brier / 2", clustered=True),
            # as in the in-context suite, the demonstrations are fixed, not drawn: its items are no clusters
            Group(LABELS, version, _chance(labelled), "1 - Brier / 2"),
        ),
        (*asked, *labelled),
        {"num_fewshot": ask.num_fewshot, "limit": limit, "seed": ask.seed},
    )


def _chance(probes: Sequence[Probe]) -> float:
    return fmean(uniform_score(len(p.answers)) for p in probes)


def _tasks() -> list[Task]:
    return [t for t in held_out_tasks() if t.labels]


def _labelled(ask: Ask, limit: int) -> list[Probe]:
    """The first `limit` items, the tasks in turn."""
    tasks = _tasks()
    most = math.ceil(limit / len(tasks))
    columns = [
        [
            _probe(task, item)
            for item in items_of(task, tokenizer=ask.tokenizer, num_fewshot=ask.num_fewshot, limit=most, seed=ask.seed)
        ]
        for task in tasks
    ]
    return [p for row in zip_longest(*columns) for p in row if p is not None][:limit]


def _probe(task: Task, item: Item) -> Probe:
    """A question with every label as an answer, written the way the format writes the right one."""
    assert task.labels is not None, "only tasks with labels"
    answer = item.prompt.answer
    lead = answer[: len(answer) - len(answer.lstrip())]
    answers = tuple(lead + label + item.prompt.stop for label in task.labels)
    return Probe(
        LABELS,
        f"{LABELS}/{item.id}",
        "calibrated",
        item.prompt.context,
        answers,
        right=answers.index(answer + item.prompt.stop),
        cluster=item.cluster,
    )


def summary(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Calibration of the items of one task, or of several.

    Returns:
        "ece": expected calibration error, 15 bins, 0 is best; "brier": mean over items of the squared errors summed
        over the answers, 0 to 2, 0 is best; "accuracy": share of likeliest answers that are right; "confidence": mean
        probability of the likeliest answer. Confidence above accuracy is overconfidence.

    Raises:
        HoldfastError: there are no items, or they were not scored as probabilities.
    """
    wrong = next((i for i in items if not {"confidence", "hit", "brier"} <= i.keys()), None)
    if not items or wrong is not None:
        what = f"The item {wrong['id']!r} has no probabilities." if wrong else "There are no items to summarise."
        raise HoldfastError(what, "Give the items of a task of the suite 'calibration'.")
    confidence, hit = [i["confidence"] for i in items], [i["hit"] for i in items]
    return {
        "ece": ece(confidence, hit),
        "brier": fmean(i["brier"] for i in items),
        "accuracy": fmean(hit),
        "confidence": fmean(confidence),
    }
