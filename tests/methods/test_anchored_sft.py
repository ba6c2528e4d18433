"""AnchoredSFT: DFT's weights and a forward KL to the base at the same answer tokens."""

import math

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import DFT, AnchoredSFT, KLToBase, LoRA, ProMoT
from holdfast.plan import Host, Plan
from holdfast.services import Context


def test_hand_value(toy_view):
    # tuned (0.8, 0.1, 0.1), base (1/2, 1/4, 1/4), target 0:
    # weight p = 0.8;  KL(base || tuned) = 1/2 ln(0.5/0.8) + 1/2 ln(0.25/0.1) = ln 1.25;  term 0.05 ln 1.25
    view = toy_view(torch.tensor([[0.8, 0.1, 0.1]]).log(), [0], base=[[0.5, 0.25, 0.25]])
    method = AnchoredSFT(weight=0.05)
    assert method.token_weight(view).item() == pytest.approx(0.8)
    term = method.loss(view)
    assert term.owner == "task"
    assert term.value.tolist() == pytest.approx([0.05 * math.log(1.25)], rel=1e-5)


def test_weight_zero_is_dft(tiny_model, start, token_rows, gradients):
    one = gradients(start([AnchoredSFT(weight=0.0)], tiny_model(), teacher_rows=token_rows), token_rows)
    two = gradients(start([DFT()], tiny_model()), token_rows)
    assert one[0] == two[0]
    assert all(torch.equal(one[1][n], two[1][n]) for n in two[1])


def test_kl_is_zero_at_the_start(tiny_model, start, token_rows, gradients):
    """At step 0 the model is the base: the loss is DFT's, and the KL adds no gradient."""
    methods = [LoRA(r=2), AnchoredSFT(weight=10.0)]
    one = gradients(start(methods, tiny_model(), teacher_rows=token_rows), token_rows)
    two = gradients(start([LoRA(r=2), DFT()], tiny_model()), token_rows)
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    for name in two[1]:
        torch.testing.assert_close(one[1][name], two[1][name], atol=1e-5, rtol=1e-4)


def test_kl_pulls_once_the_model_moved(tiny_model, start, token_rows, gradients):
    losses = []
    for weight in (0.0, 1.0, 2.0):
        session = start([AnchoredSFT(weight=weight)], tiny_model(), teacher_rows=token_rows)
        with torch.no_grad():
            for p in session.params.values():
                p.mul_(1.5)
        losses.append(gradients(session, token_rows)[0])
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)


@pytest.mark.parametrize("other", [DFT(), KLToBase(), ProMoT()])
def test_refuses_what_it_contains(other, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=f"AnchoredSFT and {other.name}"):
        Plan([AnchoredSFT(), other]).check(Host("plain"), Context(tiny_model(), tokenizer))


def test_negative_weight_is_refused(tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"AnchoredSFT\.weight"):
        AnchoredSFT(weight=-0.1).check(Context(tiny_model(), tokenizer))
