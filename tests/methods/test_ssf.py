"""SSF: factor and shift by hand, folded into maps and norms of every kind."""

import pytest
import torch
from torch import nn

import zoo
from cases import run
from holdfast import methods as hf
from holdfast.engine.forward import forward
from holdfast.engine.replaced import replaced_in
from holdfast.errors import PlanError
from holdfast.methods.adapt.ssf import Scaled, adds_one, is_norm
from holdfast.services import Context
from holdfast.sites.replace import merge


def linear(weight, bias=None):
    made = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return made


X = torch.tensor([[1.0, 1.0]])


def test_with_a_bias_by_hand():
    """W x + b = (3 + 1, 7 - 1) = (4, 6); gamma = (2, 0.5), beta = (10, 20): (18, 23).

    d sum y' / d gamma = W x + b = (4, 6), d / d beta = 1. W' = ((2, 4), (1.5, 2)), b' = (2 + 10, -0.5 + 20).
    """
    made = Scaled(linear([[1.0, 2.0], [3.0, 4.0]], [1.0, -1.0]))
    with torch.no_grad():
        made.delta.copy_(torch.tensor([1.0, -0.5]))
        made.shift.copy_(torch.tensor([10.0, 20.0]))
    y = made(X)
    assert y.tolist() == [[18.0, 23.0]]
    by_factor, by_shift = torch.autograd.grad(y.sum(), [made.delta, made.shift])
    assert by_factor.tolist() == [4.0, 6.0] and by_shift.tolist() == [1.0, 1.0]
    plain = made.folded()
    assert plain.weight.tolist() == [[2.0, 4.0], [1.5, 2.0]] and plain.bias.tolist() == [12.0, 19.5]


def test_without_a_bias_there_is_the_factor_alone():
    made = Scaled(linear([[1.0, 2.0], [3.0, 4.0]]))
    assert [n for n, _ in made.named_parameters()] == ["delta", "base_layer.weight"] and made.shift is None
    assert made(X).tolist() == [[3.0, 7.0]] and made.folded().bias is None


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_neox", "opt", "qwen2", "gpt2"])
def test_step_0_is_the_base_and_folding_is_exact(kind, start, token_rows):
    """Norms that multiply by their weight or by one more, layer norms and maps with biases, norms of heads."""
    model = zoo.build(kind).eval()
    base = forward(model, token_rows)[1]
    method = hf.SSF()
    session = start([method], model)
    assert torch.equal(forward(model.eval(), token_rows)[1], base)
    with torch.no_grad():
        for p in session.params.values():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        tuned = forward(model, token_rows)[1]
        names = set(replaced_in(model))
        merge(model, method)
        assert not replaced_in(model) and any("norm" in n or "ln_" in n for n in names)
        torch.testing.assert_close(forward(model, token_rows)[1], tuned, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(tuned, base, atol=1e-2)


def test_turned_maps_are_scaled_too(start):
    """Each block of GPT-2: c_attn 96, c_proj 32, c_fc 128, c_proj 32; each has a bias, so twice that."""
    session = start([hf.SSF(norms=False)], zoo.build("gpt2"))
    assert sum(p.numel() for p in session.params.values()) == zoo.LAYERS * 2 * (96 + 32 + 128 + 32)


def test_norms_alone_are_refused(tiny_model, tokenizer):
    model = tiny_model()
    model.model.layers = nn.ModuleList([model.model.norm])
    with pytest.raises(PlanError, match="no linear map"):
        hf.SSF().check(Context(model, tokenizer))


def test_norms_are_told_apart():
    gemma, llama = (next(m for n, m in zoo.build(k).named_modules() if n.endswith("layernorm"))
                    for k in ("gemma3_text", "llama"))  # fmt: skip
    assert is_norm(gemma) and is_norm(llama) and adds_one(gemma) and not adds_one(llama)
    assert not is_norm(nn.Linear(2, 2)) and not is_norm(nn.LayerNorm(2, elementwise_affine=False))


def test_the_count_is_as_said(tiny_model, start):
    """Each layer: q 32, k 16, v 16, o 32, gate 64, up 64, down 32, two norms of 32; one more norm of 32."""
    for norms, more in ((True, 2 * 64 + 32), (False, 0)):
        session = start([hf.SSF(norms=norms)], tiny_model())
        assert sum(p.numel() for p in session.params.values()) == 2 * 256 + more


def test_what_is_learnt_survives_half_precision(tiny_model, tokenizer, rows):
    """1 + delta in bf16 could not hold a change of 1e-3: 1.001 is 1 there."""
    model = run([hf.SSF()], tiny_model().to(torch.bfloat16), tokenizer, rows, 2, autocast=torch.bfloat16).model
    changed = torch.cat([m.delta.float() for m in replaced_in(model).values()]).abs()
    assert changed.dtype == torch.float32 and 0 < changed.max() < 4e-3 and (changed > 0).float().mean() > 0.9
