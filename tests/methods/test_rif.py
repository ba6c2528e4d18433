"""RIF: which rows stay, against hand-written answers of a base."""

import pytest

from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize
from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.methods import RIF
from holdfast.services import Context

SAID = {
    "Q: 1 + 1?\nA:": (" 2\n", " so 2\n", " 2\n"),  # always right
    "Q: 2 + 2?\nA:": (" 5\n", " 3\n", " 4\n"),  # once
    "Q: 3 + 3?\nA:": (" 7\n", " 8\n", " 9\n"),  # never
}
ROWS = tuple(Row(q, a) for q, a in zip(SAID, (" 2", " 4", " 6"), strict=True))


class Says(Context):
    """A context whose base says what is written down."""

    def answers(self, prompts, *, num, **settings):
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        return [[self.tokenizer.encode(t, add_special_tokens=False) for t in SAID[prompt][:num]] for prompt in texts]


@pytest.mark.parametrize(
    "settings, stay", [({"samples": 3}, (0, 1)), ({"samples": 2}, (0,)), ({"samples": 3, "solved": True}, (1,))]
)
def test_rows_that_no_answer_solves_are_left_out(settings, stay, tiny_model, tokenizer):
    ctx, task = Says(tiny_model(), tokenizer), [tokenize(r, tokenizer, 512) for r in ROWS]
    mix = RIF(verifier="number", **settings).data(Mix(task), ctx)
    assert [task.index(r) for r in mix.kept] == list(stay)
    assert ctx.notes == [f"RIF keeps {len(stay)} of 3 rows (verifier number)"]


def test_what_cannot_be_asked_stays(tiny_model, tokenizer):
    text = token_row([1, 5, 6, 7], 1)
    assert RIF().data(Mix([text]), Says(tiny_model(), tokenizer)).kept == [text]


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"temperature": 0.0}, {"least": 1.0}, {"verifier": "none"}])
def test_values_without_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError):
        RIF(**wrong).check(Context(tiny_model(), tokenizer))
