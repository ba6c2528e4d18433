"""The thinking suite: does the model still think when asked to, and not when told not to?

Many chat templates have a switch for thinking (measure/thoughts.py knows `enable_thinking`, `thinking` and
`reasoning`, and the marks that go around thoughts). Every easy question is asked with it on and off:

    on     right when thoughts stand between marks, the marks are closed, and an answer follows
    off    right when there is an answer, no thought between marks, and no mark without its pair; an empty pair is
           no thought

A model that always thinks, or never does, is right in half of the items, so that is the chance: it is "not
measurable", as is a model whose template has no switch (the report says so). Whether the answers are right does not
enter, since a model that answers well without obeying the switch would hide it: the share of right answers, with and
without thinking, is a figure beside the score. Thoughts that fill 768 tokens without an end count as not closed, and
thoughts without marks are not seen.

300 items of 150 questions, 40 of these written by hand and the others made from templates (tools/make_items.py).
Simulated (benchmarks/suite_power.py, 200 checks, base right in 0.9, a tenth of the marks change): a true loss of 5
points of the score is called "lost" with probability 0.81, none with 0.04. No public model that thinks has been
measured yet: the tests plant the answers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.instructions import MADE, in_turn, read_data
from holdfast.measure.thoughts import SWITCHES, heard, rendered, switch_of
from holdfast.measure.verifiers import KNOWN

LIMIT = 150  # questions, each asked twice
TASK = "switch"
ON_TOKENS, OFF_TOKENS = 768, 96
NO_SWITCH = f"the chat template has no switch for thinking ({', '.join(SWITCHES)}), so there is nothing to ask"


def judge(output: str, prompt: str, on: bool) -> float:
    """1 when an output thinks as it was told to and answers, else 0."""
    said = heard(output, prompt)
    return float(bool(said.answer) and said.paired and bool(said.thoughts) == on)


def marks(output: str, prompt: str, on: bool, question: dict[str, str]) -> dict[str, float]:
    """What is right about an output: the thinking, and the answer after it."""
    kind, reference = ("number", question["number"]) if "number" in question else ("contains", question["word"])
    right = KNOWN[kind](heard(output, prompt).answer, reference, None)
    first, second = ("thinks when asked", "right after thinking") if on else ("silent when told", "right without")
    return {first: judge(output, prompt, on), second: right}


def build_suite(ask: Ask) -> Suite:
    """Every question with the switch on and off; nothing, and a note, where the template has none."""
    data = read_data("thinking")
    limit, switch = ask.limit or LIMIT, switch_of(ask.tokenizer)
    settings = {"limit": limit, "seed": ask.seed, "data_version": data["version"], "switch": switch}
    if switch is None:
        return Suite("thinking", (), (), settings, NO_SWITCH)
    written = list(enumerate(data["questions"]))
    made = list(enumerate(data[MADE], len(written)))
    asked = in_turn(f"thinking/{ask.seed}", written, made)[:limit]
    probes = [_probe(ask, switch, n, row, on) for n, row in asked for on in (True, False)]
    return Suite("thinking", (Group(TASK, data["version"], 0.5, "obeyed"),), tuple(probes), settings)


def _probe(ask: Ask, switch: str, n: int, row: dict[str, Any], on: bool) -> Probe:
    prompt = rendered(ask.tokenizer, [{"role": "user", "content": row["question"]}], {switch: on})
    wanted = row.get("number") or row["word"]
    return Probe(
        TASK,
        f"{TASK}/{n}/{'on' if on else 'off'}",
        "generate",
        prompt,
        judge=partial(judge, prompt=prompt, on=on),
        marks=partial(marks, prompt=prompt, on=on, question=row),
        expected=f"thoughts and {wanted}" if on else f"{wanted} without thoughts",
        max_tokens=ON_TOKENS if on else OFF_TOKENS,
        with_special=True,
    )
