"""FLOW: weights of rows by hand, and whose losses they come from."""

import math

import numpy as np
import pytest

from cases import token_rows
from holdfast.data.mix import Mix
from holdfast.engine.base import token_logp
from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.methods import FLOW
from holdfast.services import Context

ROWS = [token_row([0, n, n, n], 2) for n in (1, 2, 3)]
LOSSES = [np.array([1.0, 3.0]), np.array([4.0, 4.0]), np.array([0.5, 0.5])]


def weights(**settings):
    found = FLOW(**settings).weights(ROWS, LOSSES)
    return [found[r.key].tolist() for r in ROWS]


def test_weights_of_rows_by_hand():
    """Means 2, 4, 0.5; their median is 2: exp(-1), exp(-2), exp(-0.25). The prompt's tokens have 1."""
    wanted = [[1, 1, w, w] for w in (math.exp(-1), math.exp(-2), math.exp(-0.25))]
    np.testing.assert_allclose(weights(), wanted, rtol=1e-6)


def test_weights_of_tokens_by_hand():
    """Losses 1, 3, 4, 4, 0.5, 0.5: the median is 2."""
    wanted = [[1, 1, *np.exp(-loss / 2.0)] for loss in LOSSES]
    np.testing.assert_allclose(weights(by="token"), wanted, rtol=1e-6)


def test_a_high_temperature_is_plain_and_a_low_one_the_easiest_row():
    assert np.allclose(weights(temperature=1e9), 1)
    low = weights(temperature=0.05)
    assert low[2][2] > 1e10 * low[0][2] > 0


def test_rows_are_weighted_by_the_untouched_base_and_no_other_rows(tiny_model, tokenizer, rows):
    task, model = token_rows(rows, tokenizer), tiny_model()
    mix = FLOW().data(Mix(task), Context(model, tokenizer, rows=rows))
    means = [-logp.mean() for logp in token_logp(model, task)]
    for row, mean in zip(task, means, strict=True):
        got = mix.mapped(row).numbers["FLOW"][row.scored]
        np.testing.assert_allclose(got, math.exp(-mean / np.median(means)), rtol=1e-4)
    other = token_row([0, 5, 6], 1, source="Replay")
    assert mix.mapped(other) is other


def test_a_base_that_knows_every_row_is_refused():
    with pytest.raises(PlanError, match="the median of these is 0"):
        FLOW().weights(ROWS, [np.zeros(2)] * 3)


@pytest.mark.parametrize("method", [FLOW(temperature=0.0), FLOW(by="word")])
def test_values_without_meaning_are_refused(method):
    with pytest.raises(PlanError, match=r"FLOW\."):
        method.check(None)
