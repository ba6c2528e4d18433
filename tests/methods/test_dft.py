"""DFT: token losses weighted by their own probability, against hand-computed values."""

import math

import pytest
import torch

from holdfast.engine.forward import forward
from holdfast.methods import DFT


def test_weight_is_the_probability_of_the_target(toy_view):
    # p = (1/2, 1/4, 1/4), targets 0 and 1: weights 1/2 and 1/4
    view = toy_view(torch.tensor([[0.5, 0.25, 0.25]] * 2).log(), [0, 1])
    assert DFT().token_weight(view).tolist() == pytest.approx([0.5, 0.25])


def test_gradient_is_minus_p_grad_log_p(toy_view):
    # d(log p_0)/dz = onehot_0 - p = (1/2, -1/4, -1/4); times -p_0 = -1/2: (-1/4, 1/8, 1/8)
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    view = toy_view(logits, [0])
    weight = DFT().token_weight(view)
    assert not weight.requires_grad
    (-view.token_logp * weight).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.125, 0.125]]))


def test_token_loss_never_exceeds_one_over_e(toy_view):
    p = torch.cat([torch.linspace(1e-6, 1 - 1e-6, 999), torch.tensor([1 / math.e])])
    view = toy_view(torch.stack([p, 1 - p], dim=1).log(), [0] * len(p))
    loss = -view.token_logp * DFT().token_weight(view)
    assert loss.max().item() == pytest.approx(1 / math.e, abs=1e-6)  # reached at p = 1/e
    assert loss.argmax().item() == len(p) - 1
    assert loss[998].item() < 2e-6  # p -> 1: nothing left to learn


def test_session_uses_the_weight(tiny_model, start, token_rows, gradients):
    model = tiny_model()
    packed, logits = forward(model, token_rows)
    logp = logits.log_softmax(-1).gather(1, packed.target[:, None])[:, 0]
    session = start([DFT()], model)
    loss, _ = gradients(session, token_rows)
    assert loss == pytest.approx((-logp.exp() * logp).mean().item(), rel=1e-5)
