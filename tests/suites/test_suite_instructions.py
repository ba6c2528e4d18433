"""The instructions suite: its data, its floor, and what a perfect and a constant answer score."""

import runpy
from collections import Counter
from pathlib import Path

import pytest

from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask
from holdfast.measure.suites.instructions import LIMIT, MADE, build_suite, read_data
from holdfast.measure.verify import CHECKS, CONSTANTS, find, obeys

DATA = read_data("instructions")
TASKS = {task: [*rows, *DATA[MADE][task]] for task, rows in DATA["tasks"].items()}
ROWS = [(task, row) for task, rows in TASKS.items() for row in rows]

GOOD = {
    "Why do people drink water? Answer in at most twelve words.": "Because the body needs water.",
    "Write exactly two sentences about snow. Use the word snow.": "The snow falls. It is white.",
    "How many days has a week? Answer with a number only.": "7",
    "Name four animals in one line, separated by commas. Write nothing else.": "dog, cat, cow, hen",
    'Write only a JSON object with the keys "city" and "country" for Rome.': '{"city": "Rome", "country": "Italy"}',
    "Write a sentence about school that ends with the word friends.": "At school I have many friends.",
    "Write a short sentence about a car, but without the word car.": "It has four wheels and a motor.",
    "Say in German that the dog is in the garden.": "Der Hund ist im Garten.",
    "Answer in French: what is the colour of the sky?": "Le ciel est bleu.",
    "Translate into Spanish: The sun is very far from the earth.": "El sol est\u00e1 muy lejos de la tierra.",
    "Repeat these three words in the opposite order: red, green, blue.": "blue, green, red",
    "Put these months in the order of the year: May, January, March.": "January, March, May",
    "Name the first three months of the year in order.": "January, February, March",
    "WRITE ONLY IN CAPITAL LETTERS: WHAT IS THE CAPITAL OF SPAIN?": "MADRID",
    "Write this in lower case and add nothing: Milk And Bread": "milk and bread",
}


def test_the_data_is_sound():
    assert len(ROWS) >= 360 and len(TASKS) >= 6
    assert {len(rows) >= 60 for rows in TASKS.values()} == {True}
    requests = [row["request"] for _, row in ROWS]
    assert [r for r, n in Counter(r.casefold() for r in requests).items() if n > 1] == []
    assert all(r.isascii() and r == r.strip() and len(r) < 120 for r in requests)
    assert all(1 <= len(row["checks"]) <= 2 for _, row in ROWS)


def test_every_check_of_the_data_exists_and_takes_its_arguments():
    for _, row in ROWS:
        for name, *args in row["checks"]:
            assert find(name).test("A plain answer, 3 words.", *args) in (True, False)
    assert len({name for _, row in ROWS for name, *_ in row["checks"]} & set(CHECKS)) >= 18


def test_words_a_check_wants_in_a_free_answer_are_named_or_known():
    """A request that demands a word says so, or asks for a fact or a translation."""
    for task in ("length", "keywords"):
        for row in TASKS[task]:
            wanted = [w for name, *args in row["checks"] if name in ("contains", "starts", "ends") for w in args]
            assert all(w.casefold() in row["request"].casefold() for w in wanted), row


@pytest.mark.parametrize(("request_text", "answer"), GOOD.items())
def test_a_good_answer_is_obeyed_and_its_request_is_not(tokenizer, request_text, answer):
    (row,) = [row for _, row in ROWS if row["request"] == request_text]
    assert obeys(answer, row["checks"])
    probes = build_suite(Ask(tokenizer, limit=99)).probes
    (probe,) = [p for p in probes if p.context == Ask(tokenizer).chat(request_text)]
    assert (probe.judge(answer), probe.judge(f"You said: {request_text}"), probe.judge("")) == (1.0, 0.0, 0.0)


def test_no_constant_scores_above_the_stated_chance(tokenizer):
    suite = build_suite(Ask(tokenizer, limit=99))
    for group in suite.groups:
        probes = [p for p in suite.probes if p.task == group.name]
        best = max(sum(p.judge(c) for p in probes) / len(probes) for c in CONSTANTS)
        assert best == pytest.approx(group.chance, abs=1e-4)
        assert group.chance < 0.3


def test_a_smaller_limit_asks_a_subset_and_building_twice_is_the_same(tokenizer):
    def asked(limit, seed=0):
        return {(p.id, p.context) for p in build_suite(Ask(tokenizer, limit=limit, seed=seed)).probes}

    every, others, usual = asked(99), asked(99, seed=1), asked(None)
    assert asked(2) < asked(5) < asked(30) < every
    assert usual == asked(LIMIT)
    assert len(usual) == LIMIT * len(DATA["tasks"]) and 32 <= len(usual) <= 40
    assert others != every and {c for _, c in others} == {c for _, c in every}


def test_what_was_written_by_hand_is_asked_first(tokenizer):
    written = {ask_text(tokenizer, row) for rows in DATA["tasks"].values() for row in rows}
    few = {p.context for p in build_suite(Ask(tokenizer, limit=14)).probes}
    assert few == written
    made = {p.context for p in build_suite(Ask(tokenizer, limit=60)).probes} - written
    assert len(made) == 46 * len(TASKS)


def ask_text(tokenizer, row):
    return Ask(tokenizer).chat(row["request"])


def test_the_made_items_are_those_of_the_tool():
    """Each with an answer that its checks take, which the tool tries."""
    tool = Path(__file__).parents[2] / "tools" / "make_items.py"
    assert runpy.run_path(str(tool))["main"](["--check"]) == 0


def test_a_tiny_model_is_scored(tiny_model, tokenizer):
    suite = build_suite(Ask(tokenizer, limit=1))
    out = score_suite(tiny_model(), tokenizer, suite)
    assert (out["suite"], out["limit"], out["seed"]) == ("instructions", 1, 0)
    assert [t["name"] for t in out["tasks"]] == list(DATA["tasks"])
    judges = {p.id: p.judge for p in suite.probes}
    for item in (i for t in out["tasks"] for i in t["items"]):
        assert item["correct"] == judges[item["id"]](item["output"])
