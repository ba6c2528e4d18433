"""DART: how many right answers each row gets, against hand-written answers of a base."""

import pytest

from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.errors import NoEffect, PlanError
from holdfast.methods import DART
from holdfast.services import Context

ROWS = (Row("Q: 1 + 1?\nA:", " 2"), Row("Q: 2 + 2?\nA:", " 4"), Row("Q: 3 + 3?\nA:", " 6"), Row("Q: 1 + 1?\nA:", " 2"))
SAID = {  # prompt -> samples of the base, in order; "1 + 1" is easy, "2 + 2" hard, "3 + 3" never right
    "Q: 1 + 1?\nA:": ("2", "it is 2", "is 2", "so 2", "2", "2", "2", "2"),
    "Q: 2 + 2?\nA:": ("5", "6", "is 4", "7", "is  4", "4", "so 4", "3"),
    "Q: 3 + 3?\nA:": ("7",) * 8,
}


class Says(Context):
    """A context whose base says what is written down, and that counts what it was asked."""

    asked: tuple = ()

    def answers(self, prompts, *, num, **settings):
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        self.asked = (*self.asked, *((text, num) for text in texts))
        return [[self.tokenizer.encode(f" {s}\n", add_special_tokens=False) for s in SAID[t][:num]] for t in texts]


@pytest.fixture
def ctx(tiny_model, tokenizer):
    return Says(tiny_model(), tokenizer)


def added(method, ctx, rows=ROWS):
    """The answers of the source, by prompt."""
    mix = method.data(Mix([tokenize(r, ctx.tokenizer, 512) for r in rows]), ctx)
    (source,) = mix.sources
    texts = [ctx.tokenizer.decode(r.ids, skip_special_tokens=True).split("\nA:") for r in source.rows]
    assert all(r.source == "DART" and r.owner == "task" for r in source.rows)
    found = {}
    for prompt, answer in texts:
        found.setdefault(prompt, []).append(answer.strip())
    return found


def test_targets_by_hand():
    """N = 3, k = 4, f = 0, 1/4, 3/4: 12 * (0, 1/4, 3/4) = 0, 3, 9, and at least 1."""
    wrong = {b"a": 0.0, b"b": 0.25, b"c": 0.75}
    assert DART(k=4).targets(wrong) == {b"a": 1, b"b": 3, b"c": 9}
    assert DART(k=4, mode="uniform").targets(wrong) == dict.fromkeys(wrong, 4)
    assert DART(k=4).targets(dict.fromkeys(wrong, 0.0)) == dict.fromkeys(wrong, 4)  # all easy: uniform


def test_hard_rows_get_more(ctx):
    """First round: f = 0, 3/4, 1, so k = 1, round(2 * 3 * 3/7) = 3, 3. The hard rows go on to 8 samples: f = 1/2, 1,
    k = round(6 / 3) = 2 and 4. "is 4" twice is one answer. The row that stands twice is asked once."""
    got = added(DART(k=2, trials=8, round=4, verifier="number"), ctx)
    assert got == {"Q: 1 + 1?": ["2"], "Q: 2 + 2?": ["is 4", "4"]}
    assert ctx.asked == (*((p, 4) for p in SAID), ("Q: 2 + 2?\nA:", 8), ("Q: 3 + 3?\nA:", 8))
    assert ctx.notes == ["DART adds 3 right answers; 1 of 3 rows were never solved"]


def test_uniform_gives_each_row_k(ctx):
    got = added(DART(mode="uniform", k=2, trials=8, round=4, verifier="number"), ctx)
    assert got == {"Q: 1 + 1?": ["2", "it is 2"], "Q: 2 + 2?": ["is 4", "4"]}


def test_only_some_rows_are_asked_about(ctx):
    many = [Row("Q: 1 + 1?\nA:", " 2")] * 5
    added(DART(k=1, rows=2, verifier="number"), ctx, many)
    assert ctx.notes[0] == "DART asks the base about 2 of 5 rows; it adds none to the others"


def test_no_answer_to_a_row_that_is_held_out_is_added(ctx):
    mix = Mix([tokenize(r, ctx.tokenizer, 512) for r in ROWS]).hold_out(0.5)
    held = {ctx.tokenizer.decode(r.ids[~r.scored], skip_special_tokens=True) for r in mix.held_out().get("task", [])}
    (source,) = DART(k=2, verifier="number").data(mix, ctx).sources
    assert held and held & SAID.keys() and source.rows and not held & {text for text, _ in ctx.asked}


def test_samples_end_at_the_cap(ctx):
    got = added(DART(mode="uniform", k=9, trials=6, round=4, verifier="number"), ctx)
    assert {n for _, n in ctx.asked} == {4, 6}
    assert got["Q: 1 + 1?"] == ["2", "it is 2", "is 2", "so 2"]


def test_a_base_that_is_never_right_is_named(ctx):
    with pytest.raises(NoEffect, match="no right answer of the base to any of 1 rows"):
        added(DART(trials=8, verifier="number"), ctx, ROWS[2:3])


@pytest.mark.parametrize("wrong", [{"mode": "hard"}, {"share": 1.0}, {"k": 0}, {"trials": 2}, {"temperature": 0.0}])
def test_values_without_meaning_are_refused(wrong, ctx):
    with pytest.raises(PlanError, match="DART"):
        DART(**wrong).check(ctx)
