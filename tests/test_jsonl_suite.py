"""The user's own questions from a jsonl file."""

import json

import pytest

from holdfast.errors import DataError
from holdfast.measure.asking import score_suite
from holdfast.measure.jsonl import read_suite
from holdfast.measure.probe import Ask
from holdfast.measure.suites import build

ROWS = [
    {"task": "sums", "context": "2+2=", "answer": "4"},
    {"task": "sums", "prompt": "3+3=", "answer": "6", "id": "six", "cluster": "easy"},
    {"task": "sky", "context": "Sky:", "choices": [" blue", " red"], "answer": 0},
    {"task": "sky", "context": "Sun:", "choices": [" red", " blue"], "answer": " blue", "source": "me"},
    {"task": "sky", "context": "Sea:", "choices": [" red", " blue"], "answer": " red"},
    {"text": "A whole text."},
]


@pytest.fixture
def write(tmp_path):
    def make(rows, name="own.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
        return path

    return make


def test_the_three_kinds(write):
    suite = read_suite(write(ROWS), Ask(None))
    assert [(g.name, g.metric, g.clustered) for g in suite.groups] == [
        ("sums", "exact", True),
        ("sky", "choice", False),
        ("own", "likelihood", False),
    ]
    assert [g.chance for g in suite.groups] == [0, pytest.approx(2 / 3), 0]
    got = [(p.id, p.kind, p.context, p.answer, p.cluster) for p in suite.probes]
    assert got == [
        ("sums/0", "exact", "2+2=", "4", "sums/0"),
        ("sums/six", "exact", "3+3=", "6", "easy"),
        ("sky/0", "choice", "Sky:", " blue", "sky/0"),
        ("sky/1", "choice", "Sun:", " blue", "sky/1"),
        ("sky/2", "choice", "Sea:", " red", "sky/2"),
        ("own/0", "likelihood", "", "A whole text.", "own/0"),
    ]


def test_different_choices_are_guessed_uniformly(write):
    rows = [{"context": "a", "choices": list(choices), "answer": 0} for choices in ("12", "1234")]
    assert read_suite(write(rows), Ask(None)).groups[0].chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_settings_change_with_the_content(write):
    first = read_suite(write(ROWS), Ask(None))
    assert first == read_suite(write(ROWS), Ask(None))
    assert first.settings | {"content": ""} == {"num_fewshot": 0, "limit": None, "seed": 0, "content": ""}
    assert read_suite(write(ROWS[1:]), Ask(None)).settings["content"] != first.settings["content"]


def test_a_smaller_limit_asks_a_subset(write):
    path = write([{"context": f"{n}=", "answer": str(n)} for n in range(40)])
    ids = {k: [p.id for p in read_suite(path, Ask(None, limit=k)).probes] for k in (5, 12, None)}
    assert set(ids[5]) < set(ids[12]) < set(ids[None])
    assert [len(i) for i in ids.values()] == [5, 12, 40]
    assert ids[5] != ids[None][:5]
    assert ids[5] != [p.id for p in read_suite(path, Ask(None, limit=5, seed=1)).probes]


def test_it_is_measured(write, tiny_model, tokenizer):
    path = write(ROWS)
    suite = build(f"jsonl:{path}", Ask(tokenizer))
    measured = score_suite(tiny_model(), tokenizer, suite)
    assert measured["suite"] == suite.name == f"jsonl:{path}"
    assert [len(t["items"]) for t in measured["tasks"]] == [2, 3, 1]
    assert all(0 <= i["correct"] <= 1 for t in measured["tasks"] for i in t["items"])


GOOD = {"context": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a list, not an object"),
        ({"context": "a"}, "the columns context make no question"),
        ({"context": "a", "answer": " "}, "'answer' is empty"),
        ({"context": 3, "answer": "b"}, "'context' is not text"),
        ({"context": "a", "prompt": "a", "answer": "b"}, "both 'context' and 'prompt'"),
        ({"context": "a", "answer": "b", "choises": ["b"]}, "no column 'choises'"),
        ({"context": "a", "answer": "b", "task": True}, "'task' is neither"),
        ({"context": "a", "answer": "b", "id": 0}, "the id 'own/0' is given twice"),
        ({"text": "whole"}, "is likelihood here and exact at own.jsonl:1"),
        ('{"context": "a", "answer": "\\ud800"}', "half a character"),
        ({"context": "a", "choices": ["b"], "answer": 0}, "'choices' is not a list of two"),
        ({"context": "a", "choices": ["b", "b"], "answer": 0}, "holds a text twice"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "the answer 2 is not one of the 2 choices"),
        ({"context": "a", "choices": ["b", "c"], "answer": True}, "the answer True is not"),
        ({"context": "a", "choices": ["b", "c"], "answer": "d"}, "the answer 'd' is not"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write, row, what):
    with pytest.raises(DataError) as error:
        read_suite(write([GOOD, "", row]), Ask(None))
    assert error.value.what.startswith("own.jsonl:3: ") and what in error.value.what
    assert error.value.cure


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"context": "a:", "choices": [" Yes", " yes"], "answer": 1}, "' Yes' and ' yes' are the same tokens"),
        ({"context": "a:", "choices": [" \u4f60", " \u597d"], "answer": 1}, "are the same tokens"),
        ({"context": "a:", "answer": " \u4f60"}, "has no token for a part of the answer"),
        ({"context": "a:", "begins": " no \u4f60", "task": "t"}, "has no token for a part of the answer"),
        ({"context": "a:", "answer": "\u0001"}, "adds no token"),
    ],
)
def test_answers_that_the_tokenizer_cannot_tell(write, row, what):
    from tokenizers_made import word_pieces

    tokenizer = word_pieces()
    with pytest.raises(DataError) as error:
        read_suite(write([{"context": "a:", "answer": " b", "task": "good"}, "", row]), Ask(tokenizer))
    assert error.value.what.startswith("own.jsonl:3: ") and what in error.value.what
    read_suite(write([{"context": "a:", "choices": [" yes", " no"], "answer": 1}]), Ask(tokenizer))


def test_a_missing_or_empty_file(write):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_suite("nowhere.jsonl", Ask(None))
    with pytest.raises(DataError, match="holds no rows"):
        read_suite(write([]), Ask(None))
