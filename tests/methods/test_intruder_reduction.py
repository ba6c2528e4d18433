"""IntruderReduction: strong directions that the base does not have become smaller."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from holdfast.errors import PlanError
from holdfast.methods import IntruderReduction
from holdfast.services import Context

NAME = "model.layers.0.mlp.up_proj.weight"


def merged(method, base, tuned, state=None, name=NAME):
    return method.merge(name, {"base": base, "tuned": tuned}, state or {}, 1)


def planted(size=8, strength=9.0):
    """(base, tuned): diag(4, 2, 1, 0.5, ...) and the same with strength * u v^T, where u lies between all axes."""
    base = torch.diag(torch.tensor([4.0 / 2**n for n in range(size)]))
    u, v = torch.ones(size) / size**0.5, torch.eye(size)[-1]
    return base, base + strength * torch.outer(u, v)


def test_hand_value():
    # tuned is built from its own directions: with u1 = (0.6, 0.8), u2 = (0.8, -0.6), s = (10, 1) and V the identity,
    # its columns are 10 u1 and u2: [[6, 0.8], [8, -0.6]].
    # The base's directions are the axes, so m_1 = 0.8 and m_2 = 0.8. epsilon 0.9, top 1: u1 is an intruder, u2 is not
    # looked at. lambda 0.5: the first column is halved: [[3, 0.8], [4, -0.6]]. With epsilon 0.7 nothing changes.
    base, tuned = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[6.0, 0.8], [8.0, -0.6]])
    method = IntruderReduction(mitigation_lambda=0.5, top_k=1, threshold_epsilon=0.9)
    torch.testing.assert_close(merged(method, base, tuned), torch.tensor([[3.0, 0.8], [4.0, -0.6]]))
    method = IntruderReduction(mitigation_lambda=0.5, top_k=1, threshold_epsilon=0.7)
    torch.testing.assert_close(merged(method, base, tuned), tuned)


def test_a_planted_intruder_is_found_and_nothing_else():
    base, tuned = planted()
    got = merged(IntruderReduction(mitigation_lambda=0.0, top_k=1), base, tuned)
    u, s, v = torch.linalg.svd(tuned)
    assert u[:, 0].abs().max() < 0.5
    torch.testing.assert_close(got, tuned - s[0] * torch.outer(u[:, 0], v[0]), atol=1e-5, rtol=1e-5)
    stronger = base.clone()
    stronger[0, 0] += 5  # along a direction of the base: no intruder
    torch.testing.assert_close(merged(IntruderReduction(mitigation_lambda=0.0), base, stronger), stronger)


def test_embeddings_norms_and_what_did_not_change_stay():
    base, tuned = planted()
    method = IntruderReduction(mitigation_lambda=0.0)
    assert torch.equal(merged(method, base, tuned, name="model.embed_tokens.weight"), tuned)
    assert torch.equal(merged(method, base[0], tuned[0]), tuned[0]) and torch.equal(merged(method, base, base), base)


def test_the_control_has_the_norm_of_the_repair():
    base, tuned = planted()
    repaired, control = (
        merged(IntruderReduction(mitigation_lambda=0.5, top_k=1, control=c), base, tuned) - base for c in (False, True)
    )
    assert control.norm().item() == pytest.approx(repaired.norm().item(), rel=1e-5)
    torch.testing.assert_close(control / control.norm(), (tuned - base) / (tuned - base).norm())


def test_transposed_layers_are_turned(tokenizer):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, n_positions=8)
    method = IntruderReduction(mitigation_lambda=0.0, top_k=1)
    state = method.prepare(Context(GPT2LMHeadModel(config), tokenizer))
    name = "transformer.h.0.mlp.c_fc.weight"
    assert name in state and "transformer.wte.weight" not in state
    base, tuned = planted()
    got = merged(method, base.T, tuned.T, state, name)
    torch.testing.assert_close(got, merged(method, base, tuned).T)


@pytest.mark.parametrize("wrong", [{"mitigation_lambda": 1.5}, {"top_k": 0}, {"threshold_epsilon": 2.0}])
def test_values_that_make_no_sense_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match="IntruderReduction"):
        IntruderReduction(**wrong).check(Context(tiny_model(), tokenizer))
