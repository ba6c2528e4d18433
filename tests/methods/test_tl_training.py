"""TLTraining by hand: which tokens tell answers apart, their weights, value and gradient."""

import numpy as np
import pytest
import torch

from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.data.tokens import tokenize_all
from holdfast.engine.counts import count_rows
from holdfast.engine.pack import pack, token_row
from holdfast.errors import PlanError
from holdfast.methods import TLTraining
from holdfast.methods.token_weight.tl_training import NUMBER, forks, key_tokens
from holdfast.services import Context, View
from tiny import build_tokenizer

# Three names that end with 9. The first two share 1 2 and part behind it; the third shares nothing.
NAMES = [(1, 2, 3, 7, 8, 9), (1, 2, 4, 9), (5, 6, 7, 7, 7, 7, 7, 7, 7, 7, 9)]
WEIGHTS = [
    [2, 1, 2, 1, 1, 1],  # key 1 and 3, rest four: 4 / 2
    [1, 1, 1, 1],  # key 1 and 4, rest two: not fewer than the rest
    [9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],  # key 5, rest ten: 10, and 9 is the most
]
CTX = Context(None, build_tokenizer())


def rows_of(names=NAMES, source="task"):
    return [token_row([11, 12, *name], 2, source=source) for name in names]


def mapped(mix, rows, method=TLTraining()):  # noqa: B008
    return [method.data(mix, CTX).maps[0](r) for r in rows]


def test_where_answers_part():
    assert forks(NAMES) == {(), (1, 2)}
    assert forks([(1, 2), (1, 2, 3), (1, 2, 4)]) == {(1, 2)}  # a name that another one continues
    assert key_tokens((1, 2, 3), {(), (1, 2)}) == [True, False, True]


def test_weights_by_hand():
    got = mapped(Mix(rows_of()), rows_of())
    for row, weights in zip(got, WEIGHTS, strict=True):
        assert row.numbers[NUMBER].tolist() == [1, 1, *weights]


def in_json(name, city):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


def in_python(name, city):
    return f"{name}(city='{city}')"


@pytest.mark.parametrize("write", [in_json, in_python])
def test_arguments_of_tool_calls_are_no_key_tokens(write):
    """Two calls of one tool part nowhere. With get_time the three part behind "get_", as their names do, and beside
    the tool get_weather_now also behind get_weather."""
    tokenizer = CTX.tokenizer
    said = [write("get_weather", "Paris"), write("get_weather", "London"), write("get_time", "Paris")]
    rows = tokenize_all([Row("Call:", text) for text in said], tokenizer, None)
    behind = lambda row, text: len(tokenizer(f"Call:{text}")["input_ids"]) - int((~row.scored).sum())  # noqa: E731
    name_at, name_end = said[0].index("weather"), said[0].index("weather") + len("weather")

    def key(rows, n):
        return {int(i) for i in np.flatnonzero(mapped(Mix(rows), rows)[n].numbers[NUMBER][rows[n].scored] > 1)}

    assert key(rows[:2], 0) == key(rows[:2], 1) == {0}
    assert key(rows, 0) == key(rows, 1) == {0, behind(rows[0], said[0][:name_at])}
    longer = [*rows, *tokenize_all([Row("Call:", write("get_weather_now", "Paris"))], tokenizer, None)]
    assert key(longer, 0) == {*key(rows, 0), behind(rows[0], said[0][:name_end])}


def test_value_and_gradient_by_hand():
    """The sum of weighted losses by the sum of weights, 8 + 4 + 19 = 31. Twenty tokens alike: p = 1/20, so at a
    target d loss / d logit = w / 31 * (1/20 - 1)."""
    rows = mapped(Mix(rows_of()), rows_of())
    weights = torch.tensor([w for row in WEIGHTS for w in row], dtype=torch.float32)
    logits = torch.zeros(21, 20, requires_grad=True)
    view = View(pack(rows), logits, 0, None, {}, None, "TLTraining", {}, {}, {}, counts=count_rows(rows))
    losses = torch.arange(21.0)
    method = TLTraining()
    assert (method.token_weight(view) * losses).sum().item() / 21 == pytest.approx((weights @ losses).item() / 31)
    (method.token_weight(view) * -view.token_logp).sum().div(21).backward()
    at = logits.grad[torch.arange(21), view.packed.target]
    torch.testing.assert_close(at, -0.95 * weights / 31)


def test_the_sum_is_over_the_whole_step():
    """A micro-batch of the second name alone, whose weights are 1, in a step of all three: 21 / 31 each."""
    rows = mapped(Mix(rows_of()), rows_of())
    logits = torch.zeros(4, 20)
    view = View(pack(rows[1:2]), logits, 0, None, {}, None, "TLTraining", {}, {}, {}, counts=count_rows(rows))
    assert TLTraining().token_weight(view).tolist() == pytest.approx([21 / 31] * 4)


def test_rows_of_other_methods_have_weight_1():
    mix, other = Mix(rows_of()), rows_of(source="Replay")[2]
    assert mapped(mix, [other]) == [other]
    rows = [*mapped(mix, rows_of()), other]
    counts = count_rows(rows)
    view = View(pack([other]), torch.zeros(11, 20), 0, None, {}, None, "TLTraining", {}, {}, {}, counts=counts)
    assert view.total(NUMBER) == 31 + 11
    assert TLTraining().token_weight(view).tolist() == pytest.approx([32 / 42] * 11)


def test_what_has_nothing_to_weight_is_refused():
    with pytest.raises(PlanError, match="no answer of the task has more others"):
        TLTraining().data(Mix(rows_of([(1, 9), (2, 9)])), CTX)
    with pytest.raises(PlanError, match="max_weight"):
        TLTraining(max_weight=0.5).check(CTX)
    assert np.isclose(mapped(Mix(rows_of()), rows_of(), TLTraining(max_weight=3.0))[2].numbers[NUMBER].max(), 3.0)
