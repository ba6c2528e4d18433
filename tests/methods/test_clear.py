"""CLEAR: confidence by hand, what is left out, and the base that is asked."""

import hashlib
import math

import numpy as np
import pytest
import torch

from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.methods import CLEAR
from holdfast.services import Context

SAID = {"Q: 2 + 2?\nA:": (" 4\n", " is 4\n", " 5\n", " 4\n"), "Q: 3 + 3?\nA:": (" 7\n",) * 4}
ROWS = (Row("Q: 2 + 2?\nA:", " 4"), Row("Q: 3 + 3?\nA:", " 6"))


class Says(Context):
    """A context whose base says what is written down."""

    def answers(self, prompts, *, num, **settings):
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        return [[encode(text) for text in SAID[prompt][:num]] for prompt in texts]


@pytest.fixture
def ctx(tiny_model, tokenizer):
    return Says(tiny_model(), tokenizer)


@pytest.fixture
def task(tokenizer):
    return [tokenize(r, tokenizer, 512) for r in ROWS]


def test_agreement_by_hand(ctx, task):
    """Of four samples three hold the 4 and none the 6."""
    got = CLEAR(samples=4, mix=1.0, verifier="number").confidence(task, ctx)
    assert got == {task[0].key: 0.75, task[1].key: 0.0}


def test_reflection_is_the_mean_over_both_orders(ctx, task, tokenizer):
    """By the model's own forward: P(A) where A says yes, and P(B) where B does."""
    got = CLEAR(samples=1, mix=0.0).confidence(task[:1], ctx)[task[0].key]
    wanted = 0.0
    for n, (first, second) in enumerate((("Yes", "No"), ("No", "Yes"))):
        text = (
            f"Q: 2 + 2?\nA:\n\nProposed answer: 4\n\nIs the proposed answer right?\n(A) {first}\n(B) {second}\n"
            "The letter of the right choice is"
        )
        ids, logp = tokenizer(text)["input_ids"], []
        for letter in (" A", " B"):
            more = tokenizer(letter, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                out = ctx.model(torch.tensor([[*ids, *more]])).logits[0].log_softmax(-1)
            logp.append(sum(out[len(ids) - 1 + i, t].item() for i, t in enumerate(more)))
        wanted += 0.5 / (1 + math.exp(logp[1 - n] - logp[n]))
    assert got == pytest.approx(wanted, rel=1e-4)


def test_confidence_mixes_both(ctx, task):
    whole, agree, reflect = (
        CLEAR(samples=4, mix=m, verifier="number").confidence(task, ctx)[task[0].key] for m in (0.7, 1.0, 0.0)
    )
    assert whole == pytest.approx(0.7 * agree + 0.3 * reflect)


def test_a_question_that_does_not_fit_leaves_agreement_alone(ctx, task):
    ctx.model.config.max_position_embeddings = 32  # prompt and answer fit, the question about them does not
    got = CLEAR(samples=4, mix=0.7, verifier="number", max_new_tokens=4).confidence(task, ctx)
    assert got == {task[0].key: 0.75, task[1].key: 0.0}
    assert ctx.notes[0].startswith("CLEAR judges 2 rows by agreement alone")


def test_rows_beyond_the_cap_stay(ctx, task):
    """Of 2 rows 1 is asked about: the threshold is its own, and the note says so."""
    mix = CLEAR(samples=4, rows=1, gamma=1.0, most=0.9, verifier="number").data(Mix(task), ctx)
    assert len(mix.kept) == 2 and ctx.notes[0] == "CLEAR asks the base about 1 of 2 rows; the others stay"


def test_thresholds_by_hand():
    sure = np.array([0.9, 0.1, 0.5, 0.7, 0.3])
    assert CLEAR().threshold(sure) == 0.5  # the median: two rows go
    assert CLEAR(gamma=0.6).threshold(sure) == 0.5  # three are below; half of five rows are two
    assert CLEAR(gamma=0.6, most=0.9).threshold(sure) == 0.6
    assert CLEAR(gamma=0.2).threshold(sure) == 0.2


def test_rows_of_low_confidence_are_left_out_and_told(ctx, task):
    mix = CLEAR(samples=4, gamma=0.5, verifier="number").data(Mix(task), ctx)
    assert [r.key for r in mix.kept] == [task[0].key] and mix.left_out == {"CLEAR": 0.5}
    assert ctx.notes == ["CLEAR leaves out 1 of 2 rows: confidence below 0.500"]


def test_every_row_that_was_asked_about_has_a_verdict(ctx, task):
    """The last one has no prompt: it stays, and no confidence is known."""
    CLEAR(samples=4, mix=1.0, gamma=0.5, most=0.9, verifier="number").data(Mix([*task, token_row([5, 6], 1)]), ctx)
    said = ctx.verdicts["CLEAR"]
    assert [(v["row"], v["confidence"], v["verdict"]) for v in said] == [
        (0, 0.75, "kept"),
        (1, 0.0, "left out"),
        (2, None, "kept"),
    ]
    assert [v["key"] for v in said[:2]] == [hashlib.sha256(r.key).hexdigest()[:16] for r in task]


@pytest.mark.parametrize(
    "wrong", [{"gamma": 1.5}, {"mix": -0.1}, {"most": 1.0}, {"samples": 0}, {"question": "{prompt} right?"}]
)
def test_values_without_meaning_are_refused(wrong, ctx):
    with pytest.raises(PlanError, match="CLEAR"):
        CLEAR(**wrong).check(ctx)
