"""The reasoning suite: small problems of arithmetic and logic, and whether worked steps still help.

Eight tasks of three levels each. Every question follows the same four demonstrations of its task, so the scorer
computes them once. A free answer is right when the greedy line is exactly that answer; a closed set is ranked by
likelihood. Two tasks have a twin "... with steps": a sixth of the same questions, but the demonstrations show worked
steps, the model writes its own, and only the number after "answer is" counts.

What it does not show: long chains of thought. The steps are a line long, and a small base model solves few of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.in_context import shuffled

DATA = Path(__file__).with_name("data") / "reasoning.json"
LIMIT = 48  # items of a task: a loss of 5 points shows (benchmarks/suite_power.py)
STEPS_SHARE = 6  # one in so many is also asked with steps: writing costs far more than scoring
STEPS_TOKENS = 48  # three lines of arithmetic and the final sentence, one token a digit
QUESTION = "Q: {question}\nA:"
_NUMBER = re.compile(r"answer is:?\s*(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


def spread(key: str, items: Sequence[Any], stratum: Callable[[Any], Hashable]) -> list[Any]:
    """`items` shuffled by `key`, one of each stratum in turn: any first n of them are balanced."""
    strata: dict[Hashable, list[Any]] = {}
    for item in shuffled(key, items):
        strata.setdefault(stratum(item), []).append(item)
    columns = [strata[s] for s in sorted(strata, key=str)]
    return [item for row in zip_longest(*columns) for item in row if item is not None]


def read_answer(text: str) -> str | None:
    """The first number after "answer is", before the model goes on to a question of its own; None if there is none."""
    found = _NUMBER.search(text.split("Q:")[0])
    return found[1].replace(",", "") if found else None


def final_answer_is(answer: str, text: str) -> float:
    """1 if the number after "answer is" is `answer`, a whole number, else 0."""
    given = read_answer(text)
    return float(given is not None and float(given) == float(answer))


def build_suite(ask: Ask) -> Suite:
    """Eight scored tasks of `limit` items, and the twins of two of them with a third as many."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    limit = ask.limit or LIMIT
    groups, probes = [], []
    for task in data["tasks"]:
        name, items = task["name"], [{**item, "n": n} for n, item in enumerate(task["items"])]
        asked = spread(f"{name}/{ask.seed}", items, lambda i: (i["level"], i["right"]))[:limit]
        groups.append(Group(name, data["version"], chance_of(task), task["kind"]))
        probes += [_scored(task, item) for item in asked]
        if "steps" in task["shots"][0]:
            groups.append(Group(f"{name} with steps", data["version"], chance_of(task), "exact final answer"))
            probes += [_with_steps(task, item) for item in asked[: max(1, limit // STEPS_SHARE)]]
    return Suite("reasoning", tuple(groups), tuple(probes), {"limit": limit, "seed": ask.seed})


def chance_of(task: dict[str, Any]) -> float:
    """Score of the best constant answer, or place, of one task of the data."""
    closed = task["kind"] == "choice"
    given = Counter(item["right"] if closed else item["answers"][item["right"]] for item in task["items"])
    return max(given.values()) / len(task["items"])


def _scored(task: dict[str, Any], item: dict[str, Any]) -> Probe:
    form = task["form"]
    shots = "".join(f"{form.format(**shot)} {shot['answer']}\n" for shot in task["shots"])
    return Probe(
        task["name"],
        f"{task['name']}/{item['n']}",
        task["kind"],
        shots + form.format(**item),
        tuple(f" {answer}\n" for answer in item["answers"]),  # the newline tells 9 from 90
        item["right"],
    )


def _with_steps(task: dict[str, Any], item: dict[str, Any]) -> Probe:
    shots = "".join(f"{QUESTION.format(**s)} {s['steps']} The answer is {s['answer']}.\n" for s in task["shots"])
    answer = item["answers"][item["right"]]
    name = f"{task['name']} with steps"
    return Probe(
        name,
        f"{name}/{item['n']}",
        "generate",
        shots + QUESTION.format(**item),
        judge=partial(final_answer_is, answer),
        expected=f"... The answer is {answer}.",
        max_tokens=STEPS_TOKENS,
    )
