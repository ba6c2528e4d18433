"""The shots suite: how quickly a model picks up a new task, one demonstration after another.

One sequence is 17 pairs of one held-out task in one format. Its k-th probe reads the first k pairs and asks the next
one, so each context begins the following one: the scorer's prefix tree computes the whole curve for the price of its
longest prompt. The probes of a sequence share their demonstrations, hence are one cluster. The answer's mean
-logprob gives a second curve, the label loss by demonstrations, which moves long before the accuracy does.

Curve, gain and loss by demonstration follow Brown et al. 2020 (arXiv 2005.14165) and Olsson et al. 2022 (2209.11895).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from holdfast.data.fewshot import FORMATS, build
from holdfast.errors import HoldfastError
from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.in_context import shuffled
from holdfast.measure.tasks import Task, held_out_tasks

MOST = 16  # demonstrations at the end of a sequence
LIMIT = 3 * (MOST + 1)  # probes of each task: three sequences
FORMS = ("qa", "arrow", "io")  # cheap ones; each sequence has the next
TASKS = (  # held-out tasks of short items
    "antonym",
    "capital",
    "category",
    "comparative",
    "english_german",
    "first_letter",
    "nationality",
    "past_tense",
    "person_or_place",
    "uppercase",
)


def sequence(task: Task, number: int, seed: int, tokenizer: Any = None) -> Iterator[Probe]:
    """The probes of the `number`-th sequence of a task, k = 0..MOST; no pair is in two sequences."""
    form = FORMATS[FORMS[number % len(FORMS)]]
    start = number * (MOST + 1)
    pairs = shuffled(f"shots/{task.name}/{seed}", task.items)[start : start + MOST + 1]
    for k, query in enumerate(pairs):
        prompt = build(form, pairs[:k], query, instruction=task.instruction, names=task.names, tokenizer=tokenizer)
        yield Probe(
            task.name,
            f"{task.name}/{start + k}",
            "exact",
            prompt.context,
            (prompt.answer + prompt.stop,),
            cluster=f"{task.name}/{number}/{form.name}",
            shots=k,
        )


def build_suite(ask: Ask) -> Suite:
    """Whole sequences first; a `limit` that is no multiple of 17 ends in a shorter one (17 = k of 0 to 16)."""
    limit = ask.limit or LIMIT
    tasks = held_out_tasks(TASKS)
    probes: list[Probe] = []
    for task in tasks:
        numbers = range(min(-(-limit // (MOST + 1)), len(task.items) // (MOST + 1)))
        probes += [p for n in numbers for p in sequence(task, n, ask.seed, ask.tokenizer)][:limit]
    groups = tuple(Group(t.name, t.version, t.chance, "exact", clustered=True) for t in tasks)
    return Suite("shots", groups, tuple(probes), {"limit": limit, "seed": ask.seed})


def by_shots(items: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Items by number of demonstrations, ascending; those that carry none are left out."""
    at: dict[int, list[Mapping[str, Any]]] = {}
    for i in items:
        if "shots" in i:
            at.setdefault(i["shots"], []).append(i)
    return dict(sorted(at.items()))


def curve(items: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """{demonstrations: (accuracy, mean -logprob of the answer in nats)}, ascending, of measured items.

    Raises:
        HoldfastError: there are no items, or they carry no number of demonstrations.
    """
    if not items or any("shots" not in i for i in items):
        raise HoldfastError(
            "A curve over demonstrations needs items with 'shots', and these have none.",
            "Give the items of a measurement of the suite 'shots'.",
        )
    return {
        k: (sum(i["correct"] for i in at) / len(at), -sum(i["logprob"] for i in at) / len(at))
        for k, at in by_shots(items).items()
    }


def gain(items: Sequence[Mapping[str, Any]]) -> float:
    """Mean accuracy over the points with demonstrations, less the accuracy without.

    Raises:
        HoldfastError: there is nothing with, or nothing without demonstrations.
    """
    points = curve(items)
    shown = [accuracy for k, (accuracy, _) in points.items() if k >= 1]
    if 0 not in points or not shown:
        raise HoldfastError(
            f"The gain compares items without and with demonstrations; these have only {sorted(points)}.",
            "Measure the suite 'shots' with a limit of 2 or more.",
        )
    return sum(shown) / len(shown) - points[0][0]


def area(items: Sequence[Mapping[str, Any]]) -> float:
    """Mean accuracy over the curve: its trapezoid area over k divided by the range of k; of one point, itself."""
    points = [(k, accuracy) for k, (accuracy, _) in curve(items).items()]
    if len(points) == 1:
        return points[0][1]
    pieces = [(b - a) * (y + z) / 2 for (a, y), (b, z) in pairwise(points)]
    return sum(pieces) / (points[-1][0] - points[0][0])
