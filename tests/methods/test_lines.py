"""LiNeS: the update scaled by layer."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import LiNeS, WiSEFT
from holdfast.services import Context

NAME = "model.layers.{}.mlp.up_proj.weight"


def pair(base, tuned):
    return {"base": base, "tuned": tuned}


def test_hand_values():
    # alpha 0.2, 5 blocks: 0.2 + 0.8 * l / 4 = 0.2, 0.4, 0.6, 0.8, 1.0; outside the blocks 0.2
    method = LiNeS(alpha=0.2)
    assert [method.factor(NAME.format(n), 5) for n in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert method.factor(outside, 5) == 0.2
    # base 10, tuned 20, block 2 of 0..4: 10 + 0.6 * 10 = 16
    got = method.merge(NAME.format(2), pair(torch.tensor([10.0]), torch.tensor([20.0])), {}, 5)
    assert got.item() == pytest.approx(16.0)


@pytest.mark.parametrize("layers", [2, 3, 7, 12, 30])
def test_last_block_is_kept_exactly(layers):
    base, tuned = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    for tenth in range(10):
        method = LiNeS(alpha=tenth / 10)
        assert torch.equal(method.merge(NAME.format(layers - 1), pair(base, tuned), {}, layers), tuned)


def test_no_slope_is_a_straight_walk_back():
    base, tuned = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    for name in (NAME.format(0), NAME.format(3), "lm_head.weight"):
        one = LiNeS(alpha=0.3, beta=0.0).merge(name, pair(base, tuned), {}, 4)
        assert torch.equal(one, WiSEFT(alpha=0.3).merge(name, pair(base, tuned), {}, 4))


def test_both_ends():
    base, tuned = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LiNeS(alpha=1.0, beta=0.0).merge(NAME.format(1), pair(base, tuned), {}, 4), tuned)
    assert torch.equal(LiNeS(alpha=0.0, beta=0.0).merge(NAME.format(1), pair(base, tuned), {}, 4), base)
    assert LiNeS(alpha=1.0).off()
    assert not LiNeS(alpha=1.0, beta=0.5).off()


def test_linear_in_the_update_and_never_longer():
    base, tau = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    method, name = LiNeS(alpha=0.3), NAME.format(1)
    once = method.merge(name, pair(base, base + tau), {}, 4) - base
    twice = method.merge(name, pair(base, base + 2 * tau), {}, 4) - base
    torch.testing.assert_close(twice, 2 * once, atol=1e-5, rtol=1e-4)
    assert once.norm() < tau.norm()


def test_an_expert_number_is_not_a_layer():
    method = LiNeS(alpha=0.2)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert method.factor(name, 5) == pytest.approx(0.4)


def test_session_scales_every_tensor_by_its_block(tiny_model, start):
    base = dict(tiny_model(layers=3).named_parameters())
    session = start([LiNeS(alpha=0.5)], tiny_model(layers=3))
    with torch.no_grad():
        for p in session.params.values():
            p.add_(1.0)
    session.merge()
    for name, p in session.model.named_parameters():
        block = name.split("layers.")[1][0] if "layers." in name else "out"
        wanted = {"0": 0.5, "1": 0.75, "2": 1.0, "out": 0.5}[block]
        torch.testing.assert_close(p, base[name] + wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_values_outside_the_line_are_refused(tiny_model, tokenizer, alpha):
    with pytest.raises(PlanError, match=r"LiNeS\.alpha"):
        LiNeS(alpha=alpha).check(Context(tiny_model(), tokenizer))
