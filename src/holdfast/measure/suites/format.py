"""The format suite: has the form of the tuned task spread to everything else?

Format specialisation (Wang et al., ProMoT, ICLR 2024, arXiv 2211.00635): a model tuned to answer "True" or "False"
soon answers any question so. Two signs of it, both in greedy text only:

    own words   open requests; an item scores 0 when the answer is a label of the tuned task, or is empty, else 1.
                1 - score is the paper's share of outputs in the tuned format. Left out when `ask.labels` is empty,
                for then there is nothing to look for; the setting "labels" says so.
    the rest    counting, lists, JSON, length: an item scores 1 when code (measure/verify.py) finds the form asked for.

The chance of "own words" is that of a model that always answers a label: 0. A request that names a label is left out,
since its honest answer may begin with it. The paper reads the whole output; here a label counts when the first line
begins with it, so that "Positive. The text ..." is found too. No label probability mass is measured.

The default asks what was written by hand: 32 open requests and 12 of each form. Made from templates beside these
(tools/make_items.py) are 33 and 48; `limit` 60 shows a loss of 5 points (benchmarks/suite_power.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.instructions import MADE, groups_of, in_turn, probes_of_task, read_data
from holdfast.measure.verify import reply

LIMIT, FORMS = 32, 12  # open requests, and requests of each form
OWN_WORDS = "own words"
OWN_WORDS_TOKENS = 16  # a label shows in the first line; more would only cost
FORM_TOKENS = 32


def normalise(text: str) -> str:
    """Lower case, words only, one blank between them: "**Not_Sure!**" is "not sure"."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def is_label(output: str, labels: Sequence[str]) -> bool:
    """Whether the first line of an output is one of `labels`, or begins with one as whole words.

    Case and punctuation are free, and one or two words before a colon are no part of it ("Sentiment: positive").
    A label of one letter or digit must be the whole line: "A walk" is no "A", "1. Wash" no "1".
    """
    line = reply(output).partition("\n")[0]
    lines = {normalise(line), normalise(re.sub(r"^\W*\w+(?: \w+)?\W*:", "", line))}
    wanted = {normalise(label) for label in labels} - {""}
    return any(said == y or (len(y) > 1 and said.startswith(y + " ")) for said in lines for y in wanted)


def label_share(items: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> float:
    """Share of measured items (each with its "output") whose output is a label by `is_label`; 0 of none."""
    return sum(is_label(item["output"], labels) for item in items) / max(1, len(items))


def own_words(output: str, labels: tuple[str, ...]) -> float:
    """1.0 for an answer in words that is no label, else 0.0."""
    return float(bool(normalise(reply(output))) and not is_label(output, labels))


def _names_a_label(request: str, labels: Sequence[str]) -> bool:
    """One letter names nothing: else a label "a" would leave no request."""
    text = f" {normalise(request)} "
    return any(len(y) > 2 and f" {y} " in text for y in map(normalise, labels))


def _own_words_probes(ask: Ask, data: dict[str, Any], limit: int) -> list[Probe]:
    requests = in_turn(f"{OWN_WORDS}/{ask.seed}", data["own_words"], data[MADE]["own_words"])
    order = list(enumerate(requests))
    kept = [(n, r) for n, r in order if ask.labels and not _names_a_label(r, ask.labels)]
    return [
        Probe(
            OWN_WORDS,
            f"{OWN_WORDS}/{n}",
            "generate",
            ask.chat(request),
            judge=partial(own_words, labels=ask.labels),
            expected="an answer that is none of the tuned labels",
            max_tokens=OWN_WORDS_TOKENS,
        )
        for n, request in kept[:limit]
    ]


def build_suite(ask: Ask) -> Suite:
    """Open requests when there are labels to look for, and requests for a form."""
    data, limit = read_data("format"), ask.limit or LIMIT
    spoken = _own_words_probes(ask, data, limit)
    most = ask.limit or FORMS
    forms = [p for task in data["tasks"] for p in probes_of_task(ask, task, data, most, FORM_TOKENS)]
    first = (Group(OWN_WORDS, data["version"], 0.0, "own words"),) if spoken else ()
    settings = {"limit": limit, "seed": ask.seed, "labels": list(ask.labels), "data_version": data["version"]}
    return Suite("format", first + groups_of(data), (*spoken, *forms), settings)
