"""EAFT: token losses weighted by the entropy of the top K, against hand-computed values."""

import math

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import DFT, EAFT, AnchoredSFT
from holdfast.plan import Plan
from holdfast.services import Context

P = torch.tensor([[0.5, 0.25, 0.25]])


def weight(view, **settings):
    return EAFT(**settings).token_weight(view).tolist()


def test_weight_is_the_entropy_over_its_largest_value(toy_view):
    # H(1/2, 1/4, 1/4) = 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2;  K = 3: g = 1.5 ln 2 / ln 3
    g = 1.5 * math.log(2) / math.log(3)
    assert weight(toy_view(P.log(), [0])) == pytest.approx([g])
    assert weight(toy_view(P.log(), [0]), alpha=2.0) == pytest.approx([g**2])
    assert weight(toy_view(P.log(), [1])) == pytest.approx([g])  # whatever the label is


def test_the_top_tokens_are_scaled_to_sum_to_1(toy_view):
    # top 2 of (1/2, 1/4, 1/4): q = (2/3, 1/3), H = 2/3 ln 3/2 + 1/3 ln 3 = ln 3 - 2/3 ln 2;  g = H / ln 2
    wanted = (math.log(3) - 2 / 3 * math.log(2)) / math.log(2)
    assert weight(toy_view(P.log(), [0]), top_k=2) == pytest.approx([wanted])


def test_the_ends(toy_view):
    even, sure = torch.zeros(1, 40), torch.tensor([[50.0] + [0.0] * 39])
    assert weight(toy_view(even, [3])) == pytest.approx([1.0])  # unsure: plain cross-entropy
    assert weight(toy_view(sure, [3])) == pytest.approx([0.0], abs=1e-6)  # a confident conflict teaches nothing


def test_gradient_is_the_weighted_one_of_cross_entropy(toy_view):
    # d(-log p_0)/dz = p - onehot_0 = (-1/2, 1/4, 1/4), times g; nothing flows through g
    logits = P.log().requires_grad_()
    view = toy_view(logits, [0])
    weights = EAFT().token_weight(view)
    assert not weights.requires_grad
    (-view.token_logp * weights).sum().backward()
    g = 1.5 * math.log(2) / math.log(3)
    torch.testing.assert_close(logits.grad, g * torch.tensor([[-0.5, 0.25, 0.25]]))


@pytest.mark.parametrize("other", [DFT(), AnchoredSFT()])
def test_refuses_the_weight_that_means_the_opposite(other):
    with pytest.raises(PlanError, match=f"EAFT and {other.name}"):
        Plan([other, EAFT()]).check_together()


@pytest.mark.parametrize("method", [EAFT(alpha=-1.0), EAFT(top_k=1)])
def test_values_without_meaning_are_refused(method, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"EAFT\."):
        method.check(Context(tiny_model(), tokenizer))
