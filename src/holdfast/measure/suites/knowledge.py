"""The knowledge suite: facts that do not age, each asked in three phrasings, as multiple choice and as a short answer.

"multiple choice" sums the log-likelihood of each of four answers, with the end of its line, after a question; they are
scored as text and never listed, so there are no positions to balance. "short answer" is right when the greedy text
after a sentence that breaks off begins with the answer: without demonstrations and without a stop, because only the
answer fits there. Both are plain text whatever the chat template, so that they ask what a model knows and not how it
talks.

The phrasings of a fact share a cluster: some reword one clue, others lead to the same answer by another. How far
its score hangs on them is `phrasing_spread`, which is thus of wording and of clue: read it as base against tuned, not
alone. After "Evaluating the Zero-shot Robustness of Instruction-tuned Language Models" (Sun et al., arXiv 2306.11270).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.measure.probe import Ask, Group, Kind, Probe, Suite
from holdfast.measure.suites.in_context import shuffled

DATA = Path(__file__).parent / "data" / "knowledge.json"
CHOICE, SHORT = "multiple choice", "short answer"
LEVELS = ("easy", "medium", "hard")
PHRASINGS = "abc"
LIMIT = 120  # items of each task: 40 facts in 3 phrasings


@dataclass(frozen=True)
class Fact:
    """One fact. `number` is its place in the data and names it; questions and clozes are its phrasings, in order.

    `short` is what completes a cloze where that is not all of the answer ("Einstein" after "Albert").
    """

    number: int
    level: str
    area: str
    answer: str
    wrong: tuple[str, ...]
    questions: tuple[str, ...]
    clozes: tuple[str, ...]
    short: str = ""


@lru_cache(maxsize=1)
def _data() -> tuple[int, tuple[Fact, ...]]:
    raw = json.loads(DATA.read_text(encoding="utf-8"))
    return raw["version"], tuple(_fact(n, fact) for n, fact in enumerate(raw["facts"]))


def _fact(number: int, raw: dict[str, Any]) -> Fact:
    return Fact(
        number,
        raw["level"],
        raw["area"],
        raw["answer"],
        tuple(raw["wrong"]),
        tuple(raw["questions"]),
        tuple(raw["clozes"]),
        raw.get("short", ""),
    )


def version() -> int:
    """Version of the data."""
    return _data()[0]


def facts() -> tuple[Fact, ...]:
    """Every fact, easy ones first."""
    return _data()[1]


def order(seed: int) -> list[Fact]:
    """All facts in the order they are asked: easy, medium and hard in turn, each level shuffled by the seed."""
    levels = [shuffled(f"knowledge/{level}/{seed}", [f for f in facts() if f.level == level]) for level in LEVELS]
    return [fact for row in zip(*levels, strict=True) for fact in row]


def choice_probes(asked: Sequence[Fact], limit: int, task: str = CHOICE, kind: Kind = "choice") -> list[Probe]:
    """The first `limit` questions about the facts `asked`, all phrasings of a fact together."""
    return [
        Probe(
            task,
            f"{task}/{f.number}/{letter}",
            kind,
            f"Question: {question}\nAnswer:",
            tuple(f" {answer}\n" for answer in (f.answer, *f.wrong)),  # the line ends it: 12 is not 1
            cluster=f"fact/{f.number}",
        )
        for f in asked
        for letter, question in zip(PHRASINGS, f.questions, strict=True)
    ][:limit]


def cloze_probes(asked: Sequence[Fact], limit: int) -> list[Probe]:
    """The first `limit` broken-off sentences about the facts `asked`, all phrasings of a fact together."""
    return [
        Probe(
            SHORT,
            f"{SHORT}/{f.number}/{letter}",
            "begins",
            cloze,
            (f" {f.short or f.answer}",),
            cluster=f"fact/{f.number}",
        )
        for f in asked
        for letter, cloze in zip(PHRASINGS, f.clozes, strict=True)
    ][:limit]


def build_suite(ask: Ask) -> Suite:
    """Both tasks. They take their facts from two ends of one order, so that up to half the facts none is in both."""
    limit, asked = ask.limit or LIMIT, order(ask.seed)
    return Suite(
        "knowledge",
        (
            Group(CHOICE, version(), 1 / (1 + len(asked[0].wrong)), "choice", clustered=True),
            Group(SHORT, version(), 0.0, "begins", clustered=True),
        ),
        (*choice_probes(asked, limit), *cloze_probes(asked[::-1], limit)),
        {"limit": limit, "seed": ask.seed},
    )


def _phrased(item: Mapping[str, Any]) -> tuple[str, str]:
    """(task and fact, phrasing) of an item of this suite."""
    parts = item["id"].split("/")
    if len(parts) != 3 or parts[2] not in PHRASINGS:
        raise HoldfastError(
            f"The item {item['id']!r} has no phrasing: it is not of the suite 'knowledge'.",
            "Give the items of a task of 'knowledge'.",
        )
    return f"{parts[0]}/{parts[1]}", parts[2]


def _by(items: Sequence[Mapping[str, Any]], part: int) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(_phrased(item)[part], []).append(float(item["correct"]))
    return groups


def phrasing_spread(items: Sequence[Mapping[str, Any]]) -> float:
    """Mean over facts of the standard deviation (of the population) of "correct" over a fact's phrasings.

    0: no fact depends on its wording. With 0/1 scores and three phrasings the most is 0.471. A fact asked in one
    phrasing (the last one of a small limit) is left out.

    Raises:
        HoldfastError: the items are of another suite, or no fact was asked in two phrasings.
    """
    asked = [scores for scores in _by(items, 0).values() if len(scores) > 1]
    if not asked:
        raise HoldfastError(
            f"None of {len(items)} items belongs to a fact asked in two phrasings.",
            "Measure 'knowledge' with a limit of at least 3.",
        )
    return fmean(pstdev(scores) for scores in asked)


def per_phrasing(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of "correct" for each phrasing ("a", "b", "c") that was asked.

    Raises:
        HoldfastError: the items are of another suite.
    """
    return {letter: fmean(scores) for letter, scores in sorted(_by(items, 1).items())}
