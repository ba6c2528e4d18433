"""NonInstructional: where texts are cut, and what of them is trained on."""

import json

import pytest

from cases import run
from holdfast.data.encoder import Encoder
from holdfast.data.mix import Mix
from holdfast.errors import PlanError
from holdfast.methods import NonInstructional
from holdfast.methods.data.non_instructional import halves
from holdfast.services import Context

TEXT = 'One two three. "Four five six." Seven eight nine! Ten.'


@pytest.mark.parametrize(
    "text, wanted",
    [
        (TEXT, ('One two three. "Four five six."', " Seven eight nine! Ten.")),
        ("Short. A much longer second sentence that goes on and on.", ("Short.", None)),
        ("One sentence alone.", None),
        ("Costs 3.50 euros and no more", None),  # a point inside a number ends no sentence
    ],
)
def test_texts_are_cut_behind_the_sentence_nearest_the_middle(text, wanted):
    got = halves(text)
    if wanted is None:
        assert got is None
    else:
        assert got[0] == wanted[0] and got[0] + got[1] == text
        assert wanted[1] is None or got[1] == wanted[1]


def test_the_second_half_is_trained_on(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": "No second."}) + "\n")
    ctx = Context(tiny_model(), tokenizer)
    mix = NonInstructional(sources=(str(path),)).data(Mix([]), ctx)
    (row,) = mix.sources[0].rows
    first, second = (tokenizer.decode(row.ids[at], skip_special_tokens=True) for at in (~row.scored, row.scored))
    assert (first, second) == halves(TEXT) and row.owner == "task" and row.source == "NonInstructional"


def test_a_text_that_is_cut_teaches_no_end(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "One two three. Four five six. " * 4}))
    ends = []
    for most in (40, 200):
        method = NonInstructional(sources=(str(path),), max_tokens=most)
        (row,) = method.data(Mix([]), Context(tiny_model(), tokenizer)).sources[0].rows
        ends.append(row.ids[-1] == Encoder(tokenizer).end)
    assert ends == [False, True]


def test_the_base_may_write_the_second_half(tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": TEXT}))
    ctx = Context(tiny_model(), tokenizer)
    (row,) = NonInstructional(sources=(str(path),), own=True, max_tokens=64).data(Mix([]), ctx).sources[0].rows
    start = int(row.scored.argmax())
    assert tokenizer.decode(row.ids[:start], skip_special_tokens=True) == halves(TEXT)[0]
    (wanted,) = ctx.answers([row.ids[:start].tolist()], temperature=1.0, max_new_tokens=32)
    assert row.ids[start:].tolist() == wanted[0]


def test_share_and_texts_that_have_no_halves(tiny_model, tokenizer, rows, tmp_path):
    got = run([NonInstructional(share=0.25, max_tokens=48, pool=24)], tiny_model(), tokenizer, rows, 4)
    assert got.log.realised["NonInstructional/examples"] == 4
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "No second half"}))
    with pytest.raises(PlanError, match="no text of two sentences"):
        NonInstructional(sources=(str(path),)).data(Mix([]), Context(tiny_model(), tokenizer))


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"pool": 0}, {"max_tokens": 4}])
def test_values_without_meaning_are_refused(wrong):
    with pytest.raises(PlanError, match="NonInstructional"):
        NonInstructional(**wrong).check(None)
