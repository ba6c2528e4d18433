"""The template of CONTRIBUTING.md is a method that works: hand-computed values, off, a refusal, and not registered."""

import math

import pytest
import torch

from cases import run, same, weights_of
from holdfast.errors import PlanError
from holdfast.methods import all_methods
from holdfast.methods._template import ZLoss
from holdfast.services import Context


def test_hand_value_and_gradient(toy_view):
    # z = (0, 0, 0): log Z = log 3;  z = (log 2, log 3, 0): log Z = log 6;  d(log Z)^2 / dz_v = 2 log Z p_v
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), math.log(3), 0.0]]).requires_grad_()
    term = ZLoss(weight=0.5).loss(toy_view(logits, [0, 1]))
    assert term.owner == "task"
    assert term.value.tolist() == pytest.approx([0.5 * math.log(3) ** 2, 0.5 * math.log(6) ** 2])
    term.value.sum().backward()
    expected = [[math.log(3) / 3] * 3, [math.log(6) * p / 6 for p in (2, 3, 1)]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))


def test_normalised_logits_cost_nothing(toy_view):
    view = toy_view(torch.tensor([[0.5, 0.25, 0.25]]).log(), [0])
    assert ZLoss().loss(view).value.item() == pytest.approx(0, abs=1e-12)


def test_it_trains_and_its_off_value_is_no_method(tiny_model, tokenizer, rows):
    plain = run([], tiny_model(), tokenizer, rows)
    same(plain, run([ZLoss(weight=0.0)], tiny_model(), tokenizer, rows))
    pulled = weights_of(run([ZLoss(weight=1.0)], tiny_model(), tokenizer, rows).model)
    assert any(not torch.equal(pulled[n], w) for n, w in plain.weights.items())


def test_negative_weight_is_refused(tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"ZLoss\.weight"):
        ZLoss(weight=-1.0).check(Context(tiny_model(), tokenizer))


def test_it_is_not_registered():
    assert "ZLoss" not in all_methods()
