"""WiSEFT: a straight line from the base to the tuned weights."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import WiSEFT
from holdfast.services import Context


def pair(base, tuned):
    return {"base": base, "tuned": tuned}


def test_hand_value():
    # (1 - 0.25) * (4, 8) + 0.25 * (8, 0) = (5, 6)
    got = WiSEFT(alpha=0.25).merge("w", pair(torch.tensor([4.0, 8.0]), torch.tensor([8.0, 0.0])), {}, 1)
    assert got.tolist() == [5.0, 6.0]


def test_hand_value_of_parts():
    # six blocks in three parts: blocks 0 and 1 get 0, 2 and 3 get 0.5, 4 and 5 get 1; what is no block gets 0.25
    method, weights = WiSEFT(alpha=0.25, parts=(0.0, 0.5, 1.0)), pair(torch.tensor([2.0]), torch.tensor([6.0]))
    names = [*(f"model.layers.{n}.mlp.up_proj.weight" for n in range(6)), "model.norm.weight"]
    assert [method.merge(n, weights, {}, 6).item() for n in names] == [2, 2, 4, 4, 6, 6, 3]
    assert WiSEFT(alpha=1.0, parts=(1.0, 1.0)).off() and not WiSEFT(alpha=1.0, parts=(1.0, 0.5)).off()


def test_both_ends_are_exact():
    draw = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(2, 1000, generator=draw)
    assert torch.equal(WiSEFT(alpha=0.0).merge("w", pair(base, tuned), {}, 1), base)
    assert torch.equal(WiSEFT(alpha=1.0).merge("w", pair(base, tuned), {}, 1), tuned)
    assert torch.equal(WiSEFT(alpha=0.3).merge("w", pair(base, base), {}, 1), base)  # what did not move stays


def test_small_changes_survive_in_bf16(tiny_model, start):
    """Half of a change of one bf16 step is lost in bf16 arithmetic, not in fp32."""
    base, tuned = torch.tensor([1.0]), torch.tensor([1.0 + 2**-7])
    assert WiSEFT(alpha=0.5).merge("w", pair(base, tuned), {}, 1).item() == 1.0 + 2**-8


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_session_walks_back(tiny_model, start, alpha):
    base = dict(tiny_model().named_parameters())
    session = start([WiSEFT(alpha=alpha)], tiny_model())
    with torch.no_grad():
        for p in session.params.values():
            p.add_(1.0)
    session.merge()
    for name, p in session.model.named_parameters():
        torch.testing.assert_close(p, base[name] + alpha, atol=1e-6, rtol=0)
        if alpha == 0:
            assert torch.equal(p, base[name])


def test_loss_of_a_linear_model_lies_below_the_chord():
    """L(theta(a)) <= (1 - a) L0 + a L1 for a convex loss of a linear model."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=draw), torch.randn(50, generator=draw)
    base, tuned = torch.randn(2, 4, generator=draw)
    loss = lambda w: (x @ w - y).square().mean().item()  # noqa: E731
    for a in (0.1, 0.5, 0.9):
        assert loss(WiSEFT(alpha=a).merge("w", pair(base, tuned), {}, 1)) <= (1 - a) * loss(base) + a * loss(tuned)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_values_outside_the_line_are_refused(tiny_model, tokenizer, alpha):
    with pytest.raises(PlanError, match=r"WiSEFT\.alpha"):
        WiSEFT(alpha=alpha).check(Context(tiny_model(), tokenizer))
    with pytest.raises(PlanError, match=r"WiSEFT\.parts"):
        WiSEFT(parts=(0.5, alpha)).check(Context(tiny_model(), tokenizer))
