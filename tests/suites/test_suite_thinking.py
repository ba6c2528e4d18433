"""The thinking suite: finding thoughts and switches, and what planted models score."""

import copy
import io

import pytest
from rich.console import Console

from holdfast.measure import compare
from holdfast.measure.asking import score_suite
from holdfast.measure.facts import facts_of
from holdfast.measure.probe import Ask
from holdfast.measure.suites import check_suite
from holdfast.measure.suites.instructions import MADE, read_data
from holdfast.measure.suites.thinking import LIMIT, NO_SWITCH, build_suite
from holdfast.measure.thoughts import PAIRS, heard, switch_of
from holdfast.report.terminal import show, show_measured
from planted import plant

DATA = read_data("thinking")
QUESTIONS = [*DATA["questions"], *DATA[MADE]]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
TEMPLATES = {  # name of the switch: a template as models with it have
    "enable_thinking": CHAT + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "thinking": CHAT + "{% if thinking %}<think>{% else %}</think>{% endif %}",
    "reasoning": "{% if reasoning %}Think first.\n{% endif %}" + CHAT,
}


def with_template(tokenizer, template, special=()):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    own.chat_template = template
    return own


def test_the_data_is_sound():
    assert len({q["question"] for q in QUESTIONS}) == len(QUESTIONS) >= LIMIT
    assert all(q["question"].isascii() and len(q) == 2 and set(q) & {"number", "word"} for q in QUESTIONS)


@pytest.mark.parametrize(("opens", "closes"), PAIRS)
def test_thoughts_are_found(opens, closes):
    said = heard(f"{opens}\nTwo and two.\n{closes}\n\n4")
    assert (said.thoughts, said.answer, said.paired) == (("Two and two.",), "4", True)
    assert heard(f"Two and two.{closes}4", f"Say.\n{opens}\n") == heard(f"{opens}Two and two.{closes}4")
    assert heard("4", f"{opens}\n\n{closes}\n\n") == heard("4")
    assert not heard(f"{opens}Two and").paired and heard(f"{opens}Two and").answer == ""
    assert not heard(f"Two and two.{closes}4").paired
    assert heard(f"{opens}\n{closes}4").thoughts == ()


@pytest.mark.parametrize("switch", TEMPLATES)
def test_the_switch_is_found(tokenizer, switch):
    assert switch_of(with_template(tokenizer, TEMPLATES[switch])) == switch


def test_no_switch_is_no_suite_and_is_said(tokenizer, tiny_model):
    plain = with_template(tokenizer, None)
    effort = with_template(tokenizer, CHAT + "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}")
    for own in (tokenizer, plain, effort):
        suite = build_suite(Ask(own))
        assert suite.probes == () and suite.note == NO_SWITCH
        check_suite("thinking", Ask(own), 8)
    out = score_suite(tiny_model(), tokenizer, build_suite(Ask(tokenizer)))
    part = compare.ability(out, out, 0.95)
    assert (part["status"], part["note"]) == ("not measurable", NO_SWITCH)
    for tell in (lambda c: show_measured([out], c), lambda c: show({"abilities": [part]}, c)):
        console = Console(file=io.StringIO(), width=400)
        tell(console)
        assert console.file.getvalue().count(f"thinking: {NO_SWITCH}") == 1


def test_sizes_and_settings(tokenizer):
    own = with_template(tokenizer, TEMPLATES["enable_thinking"])
    suite = build_suite(Ask(own))
    assert len(suite.probes) == len({p.id for p in suite.probes}) == 2 * LIMIT
    assert suite.groups[0].chance == 0.5 and suite.settings["switch"] == "enable_thinking"
    assert len({p.context for p in suite.probes}) == 2 * LIMIT
    few = build_suite(Ask(own, limit=3))
    assert {(p.id, p.context) for p in few.probes} < {(p.id, p.context) for p in suite.probes}


def reference(p):
    row = next(q for q in QUESTIONS if q["question"] in p.context)
    return row.get("number") or row["word"]


def thinks(opens="<think>", closes="</think>"):
    return lambda p: f"{opens}\nLet me see.\n{closes}\n\nIt is {reference(p)}."


def obeys(p):
    return thinks()(p) if p.id.endswith("on") else f"It is {reference(p)}."


FOUR = ("thinks when asked", "right after thinking", "silent when told", "right without")
PLANTED = {  # the answers, and the four figures in the order of FOUR
    "obeys": (obeys, (1, 1, 1, 1)),
    "obeys and is wrong": (lambda p: obeys(p).replace(reference(p), "zq"), (1, 0, 1, 0)),
    "always thinks": (thinks(), (1, 1, 0, 1)),
    "never thinks": (lambda p: f"{reference(p)}", (0, 1, 1, 1)),
    "never ends": (lambda p: "<think>\nLet me see, and see", (0, 0, 0, 0)),
    "thinks and says nothing": (lambda p: "<think>\nLet me see.\n</think>\n", (0, 0, 0, 0)),
    "empty thoughts": (lambda p: f"<think>\n\n</think>\n\n{reference(p)}", (0, 1, 1, 1)),
    "says nothing": (lambda p: "", (0, 0, 0, 0)),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_models(tokenizer, kind):
    own = with_template(tokenizer, TEMPLATES["enable_thinking"])
    answer, expected = PLANTED[kind]
    suite = build_suite(Ask(own, limit=6))
    out = score_suite(plant(own, suite, answer), own, suite)
    assert facts_of(out) == dict(zip(FOUR, map(float, expected), strict=True))
    measurable = compare.ability(out, None, 0.95)["status"] != "not measurable"
    assert measurable == kind.startswith("obeys")


def test_thoughts_that_the_prompt_begins_and_marks_that_are_special_tokens(tokenizer):
    begun = with_template(tokenizer, TEMPLATES["thinking"])
    suite = build_suite(Ask(begun, limit=2))
    out = score_suite(plant(begun, suite, lambda p: obeys(p).removeprefix("<think>")), begun, suite)
    assert facts_of(out) == dict.fromkeys(FOUR, 1.0)
    marks = ("[THINK]", "[/THINK]")
    special = with_template(tokenizer, TEMPLATES["reasoning"], marks)
    suite = build_suite(Ask(special, limit=2))
    model = plant(special, suite, lambda p: thinks(*marks)(p) if p.id.endswith("on") else reference(p))
    assert facts_of(score_suite(model, special, suite)) == dict.fromkeys(FOUR, 1.0)
