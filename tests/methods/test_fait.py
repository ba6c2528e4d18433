"""FAIT: marks and weights by hand, against hand-written answers of a base."""

import math

import pytest
import torch

from cases import token_rows
from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.pack import TokenRow, pack
from holdfast.errors import NoEffect, PlanError
from holdfast.methods import FAIT
from holdfast.methods.token_weight.fait import LINE, TOKEN, differences
from holdfast.services import Context, View

SAID = {"Q: 2 + 2?\nA:": (" no idea\n", " it is 5\n", " it is 4\n"), "Q: 1 + 1?\nA:": (" it is 2\n",) * 3}


class Says(Context):
    """A context whose base says what is written down."""

    def answers(self, prompts, *, num, **settings):
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        return [[encode(text) for text in SAID[prompt][:num]] for prompt in texts]


def test_marks_by_hand():
    """7 8 | 9 5 6 | 3 against 7 8 | 9 4 6 | 3: the 5 differs, and its line is 9 5 6."""
    breaks = [False, True, False, False, True, False]
    differs, lines = differences([7, 8, 9, 5, 6, 3], [7, 8, 9, 4, 6, 3], breaks)
    assert differs == [False, False, False, True, False, False]
    assert lines == [False, False, True, True, True, False]
    assert differences([7, 8], [7, 8, 9], [False, False])[0] == [False, False]  # what is missing marks nothing


def test_weights_by_hand():
    """Two marked tokens of probability 1/2 and 1/8: their geometric mean is 1/4, so w = 1 + (0.5 L + 2 D) * 3/4."""
    row = TokenRow(torch.arange(4).numpy(), torch.tensor([False, True, True, True]).numpy())
    marks = {TOKEN: torch.tensor([0.0, 1, 0, 1]).numpy(), LINE: torch.tensor([0.0, 1, 1, 1]).numpy()}
    marked = TokenRow(row.ids, row.scored, numbers=marks)
    p = torch.full((6, 4), 0.25)
    p[0, 1], p[2, 3] = 0.5, 0.125
    view = View(pack([marked, row]), p.log().requires_grad_(), 0, None, {}, None, "FAIT", {}, {}, {})
    view._shared["logp"] = p.log()
    got = FAIT(line=0.5, token=2.0).token_weight(view)
    assert got.tolist() == pytest.approx([1 + 2.5 * 0.75, 1 + 0.5 * 0.75, 1 + 2.5 * 0.75, 1, 1, 1])
    assert not got.requires_grad


def test_of_the_wrong_answers_the_likest_is_compared(tiny_model, tokenizer):
    """2 + 2: "it is 5" is wrong and nearer to "it is 4" than "no idea". 1 + 1: the base never errs."""
    ctx = Says(tiny_model(), tokenizer)
    task = [
        tokenize(Row(q, a), tokenizer, 512) for q, a in (("Q: 2 + 2?\nA:", " it is 4"), ("Q: 1 + 1?\nA:", " it is 2"))
    ]
    mix = FAIT(verifier="number", tries=3).data(Mix(task), ctx)
    marked = mix.mapped(task[0])
    text = tokenizer.decode(marked.ids[marked.numbers[TOKEN] > 0])
    assert "4" in text and "it" not in text
    assert marked.numbers[LINE][marked.scored].all() and not marked.numbers[LINE][~marked.scored].any()
    assert mix.mapped(task[1]) is task[1]
    assert ctx.notes == ["FAIT has a wrong answer to compare with for 1 of 2 different rows (verifier number)"]


def test_a_prompt_that_leaves_no_room_is_not_asked_about(tiny_model, tokenizer):
    ctx = Says(tiny_model(), tokenizer)  # it knows no such prompt
    ctx.model.config.max_position_embeddings = 64
    pairs = (("Q: 2 + 2?\nA:", " it is 4"), ("Q: 2 + 2?\n" * 20 + "A:", " it is 4"))
    task = [tokenize(Row(q, a), tokenizer, 512) for q, a in pairs]
    mix = FAIT(verifier="number", tries=3, max_new_tokens=16).data(Mix(task), ctx)
    assert TOKEN in mix.mapped(task[0]).numbers and mix.mapped(task[1]) is task[1]


def test_rows_beyond_the_cap_have_weight_1(tiny_model, tokenizer):
    ctx = Says(tiny_model(), tokenizer)
    answers = [f" it is 4, {n} times" for n in range(3)]
    task = [tokenize(Row("Q: 2 + 2?\nA:", a), tokenizer, 512) for a in answers]
    mix = FAIT(verifier="exact", tries=3, rows=1).data(Mix(task), ctx)
    assert sum(TOKEN in mix.mapped(r).numbers for r in task) == 1
    assert ctx.notes[0] == "FAIT asks the base about 1 of 3 rows; the others have weight 1"


def test_a_base_that_never_errs_is_named(tiny_model, tokenizer):
    task = [tokenize(Row("Q: 1 + 1?\nA:", " it is 2"), tokenizer, 512)]
    with pytest.raises(NoEffect, match="there is one for 0 of 1"):
        FAIT(verifier="number", tries=3).data(Mix(task), Says(tiny_model(), tokenizer)).mapped(task[0])


def test_what_is_known_already_weighs_as_ever(tiny_model, tokenizer, rows):
    row = token_rows(rows, tokenizer)[0]
    marks = {n: row.scored.astype("float32") for n in (TOKEN, LINE)}
    marked = TokenRow(row.ids, row.scored, numbers=marks)
    sure = torch.full((marked.num_scored, 400), -50.0)
    sure[range(marked.num_scored), marked.predicted[marked.scored]] = 0.0
    view = View(pack([marked]), sure, 0, None, {}, None, "FAIT", {}, {}, {})
    assert FAIT().token_weight(view).tolist() == pytest.approx([1.0] * marked.num_scored, abs=1e-6)
    unsure = View(pack([marked]), torch.zeros_like(sure), 0, None, {}, None, "FAIT", {}, {}, {})
    assert FAIT().token_weight(unsure).tolist() == pytest.approx(
        [1 + 1.5 * (1 - math.exp(-math.log(400)))] * marked.num_scored
    )


@pytest.mark.parametrize("wrong", [{"line": -1.0}, {"tries": 0}, {"temperature": 0.0}, {"verifier": "none"}])
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError):
        FAIT(**wrong).check(Context(tiny_model(), tokenizer))
