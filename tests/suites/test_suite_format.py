"""The format suite: finding the tuned task's labels in other answers, and requests for a form."""

from collections import Counter

import pytest

from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask
from holdfast.measure.suites.format import OWN_WORDS, build_suite, is_label, label_share, normalise, own_words
from holdfast.measure.suites.instructions import MADE, read_data
from holdfast.measure.verify import CONSTANTS, find, obeys

DATA = read_data("format")
TASKS = {task: [*rows, *DATA[MADE][task]] for task, rows in DATA["tasks"].items()}
FORMS = [(task, row) for task, rows in TASKS.items() for row in rows]
OPEN = [*DATA["own_words"], *DATA[MADE]["own_words"]]
LABELS = ("positive", "negative")

GOOD = {
    "Count from 3 to 7, with commas between the numbers.": "3, 4, 5, 6, 7",
    "Write the numbers from 11 to 14, one on each line.": "11\n12\n13\n14",
    "Write the word yes three times and nothing else.": "Yes, yes, yes.",
    "Make bullet points of these three words: sun, moon, star.": "- sun\n- moon\n- star",
    "Write apple, plum and cherry as a numbered list.": "1. apple\n2. plum\n3. cherry",
    "Name three flowers on one line, separated by commas. Begin with rose.": "Rose, tulip, daisy",
    "Reply with JSON only: a list of the numbers 4, 5 and 6.": "[4, 5, 6]",
    'Write this as a JSON object with the keys "day" and "hour": Monday at nine.': '{"day": "Monday", "hour": 9}',
    "In one word only, name the opposite of hot.": "Cold",
    "Write two sentences, no more and no fewer, about a market.": "The market is full. People talk.",
}


def test_the_data_is_sound():
    requests = [*OPEN, *(row["request"] for _, row in FORMS)]
    instructions = read_data("instructions")
    others = [r["request"] for part in ("tasks", MADE) for rows in instructions[part].values() for r in rows]
    assert len(OPEN) >= 64
    assert list(DATA["tasks"]) == ["counting", "lists", "JSON", "length"]
    assert all(len(rows) >= 60 for rows in TASKS.values())
    assert [r for r, n in Counter(normalise(r) for r in requests + others).items() if n > 1] == []
    assert all(r.isascii() and r == r.strip() for r in requests)
    assert all(
        find(name).test("A plain answer.", *args) in (True, False) for _, r in FORMS for name, *args in r["checks"]
    )


@pytest.mark.parametrize(
    "output",
    [
        "positive",
        " Positive.",
        "**NEGATIVE**",
        "positive\nBecause",
        "Positive. The text",
        "Sentiment: negative",
        "The answer: positive",
        '"positive"',
    ],
)
def test_a_label_is_found(output):
    assert is_label(output, LABELS) and own_words(output, LABELS) == 0.0


@pytest.mark.parametrize(
    "output", ["positively glad", "I am positive.", "Rain is made of\npositive", "posit", "Not positive"]
)
def test_own_words_are_no_label(output):
    assert not is_label(output, LABELS) and own_words(output, LABELS) == 1.0


def test_labels_of_several_words_and_of_one_letter():
    assert is_label("Account_and access, I think", ("account and access",))
    assert not is_label("Account closed", ("account and access",))
    assert is_label("(A)", ("A", "B")) and is_label("Answer: b", ("A", "B"))
    assert not is_label("A walk in the wood", ("A", "B")) and not is_label("1. Wash it", ("0", "1"))
    assert not is_label("anything", ()) and not is_label("anything", ("", "?"))


def test_an_answer_without_words_is_not_in_own_words():
    assert own_words("", LABELS) == own_words(" ... ", LABELS) == 0.0


def test_the_share_of_labels():
    items = [{"output": x} for x in ("Positive.", "negative", "Rain falls.", "Well: positive")]
    assert label_share(items, LABELS) == 0.75
    assert label_share(items, ("neutral",)) == label_share(items, ()) == label_share([], LABELS) == 0.0
    assert label_share([{"output": "True"}] * 3, ("true", "false")) == 1.0


def test_a_model_that_always_says_a_label_scores_0_and_one_that_answers_1(tokenizer):
    suite = build_suite(Ask(tokenizer, labels=LABELS))
    probes = [p for p in suite.probes if p.task == OWN_WORDS]
    assert len(suite.probes) == 32 + 4 * 12 and len(probes) == 32 and all(p.max_tokens <= 24 for p in probes)
    assert {p.judge("Negative") for p in probes} == {0.0}
    assert {p.judge("That takes a while to explain.") for p in probes} == {1.0}


def test_without_labels_there_is_nothing_to_look_for(tokenizer):
    suite = build_suite(Ask(tokenizer))
    assert [g.name for g in suite.groups] == list(DATA["tasks"])
    assert suite.settings["labels"] == []
    assert build_suite(Ask(tokenizer, labels=LABELS)).settings["labels"] == list(LABELS)


def test_a_request_that_names_a_label_is_left_out_and_the_others_keep_their_ids(tokenizer):
    def asked(*labels):
        suite = build_suite(Ask(tokenizer, limit=99, labels=labels))
        return {p.id: p.context for p in suite.probes if p.task == OWN_WORDS}

    everything, fewer = asked("positive"), asked("rain", "tomato", "a")
    assert fewer.items() < everything.items()
    gone = [everything[i] for i in everything.keys() - fewer.keys()]
    assert len(gone) == 2 and all("rain is made" in c or "tomato" in c for c in gone)


def test_a_smaller_limit_asks_a_subset_and_building_twice_is_the_same(tokenizer):
    def asked(limit, seed=0):
        suite = build_suite(Ask(tokenizer, limit=limit, seed=seed, labels=LABELS))
        return {(p.id, p.context) for p in suite.probes}

    assert asked(2) < asked(7) < asked(None) == asked(None) < asked(60)
    assert len(asked(2)) == 10
    assert asked(7, seed=1) != asked(7)


@pytest.mark.parametrize(("request_text", "answer"), GOOD.items())
def test_a_good_form_is_obeyed(request_text, answer):
    (row,) = [row for _, row in FORMS if row["request"] == request_text]
    assert obeys(answer, row["checks"])
    assert not obeys("I would rather not say that today.", row["checks"])


def test_no_constant_scores_above_the_stated_chance(tokenizer):
    suite = build_suite(Ask(tokenizer, limit=99, labels=LABELS))
    for group in suite.groups[1:]:
        probes = [p for p in suite.probes if p.task == group.name]
        best = max(sum(p.judge(c) for p in probes) / len(probes) for c in CONSTANTS)
        assert best == pytest.approx(group.chance, abs=1e-4)
        assert group.chance < 0.2


def test_a_tiny_model_is_scored(tiny_model, tokenizer):
    suite = build_suite(Ask(tokenizer, limit=1, labels=LABELS))
    out = score_suite(tiny_model(), tokenizer, suite)
    assert [t["name"] for t in out["tasks"]] == [OWN_WORDS, *DATA["tasks"]]
    assert out["labels"] == list(LABELS)
    (item,) = out["tasks"][0]["items"]
    assert item["correct"] == own_words(item["output"], LABELS)
