"""PEQA: rounding and its scales by hand, and that nothing but lengths of rows can change."""

import pytest
import torch
from torch import nn

import zoo
from cases import run
from holdfast import methods as hf
from holdfast.engine.forward import forward
from holdfast.engine.replaced import replaced_in, switched_off
from holdfast.errors import PlanError
from holdfast.methods.adapt.peqa import Rounded, rounded
from holdfast.services import Context
from holdfast.sites.replace import merge


def linear(weight, bias=None):
    made = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return made


def test_rounding_by_hand():
    """2 bits, row (-1, 0.4, 2): s0 = 3 / 3 = 1, z = 1; round(W / s0) + z = (0, 1, 3), so Q = (-1, 0, 2).

    Row (2, 4, 6): the range begins at 0, s0 = 2, z = 0, Q = (1, 2, 3). A row of zeros stays one.
    """
    ints, scale = rounded(torch.tensor([[-1.0, 0.4, 2.0], [2.0, 4.0, 6.0], [0.0, 0.0, 0.0]]), 2, 0)
    assert ints.tolist() == [[-1, 0, 2], [1, 2, 3], [0, 0, 0]] and ints.dtype == torch.int8
    assert scale[:2].tolist() == [[1.0], [2.0]]


def test_groups_by_hand():
    """Halves of (-1, 2 | 4, 12): s0 = 1 and 12 / 3 = 4; Q = (-1, 2 | 1, 3)."""
    ints, scale = rounded(torch.tensor([[-1.0, 2.0, 4.0, 12.0]]), 2, 2)
    assert ints.tolist() == [[-1, 2, 1, 3]] and scale.tolist() == [[1.0, 4.0]]


@pytest.mark.parametrize("group, wanted", [(0, 3.0), (2, 3.0)])
def test_scales_by_hand(group, wanted):
    """Row (-1, 2), bias 1, x = (1, 1): s0 = 1, y = 1 * (-1 + 2) + 1 = 2; with ds = 1: 2 * 1 + 1 = 3. d y / d s = 1."""
    made = Rounded(linear([[-1.0, 2.0]], [1.0]), 2, group)
    assert made(torch.ones(1, 2)).tolist() == [[2.0]]
    with torch.no_grad():
        made.change.fill_(1.0)
    y = made(torch.ones(1, 2))
    (grad,) = torch.autograd.grad(y.sum(), [made.change])
    assert y.tolist() == [[wanted]] and grad.tolist() == [1.0]


@pytest.mark.parametrize("group", [0, 128])
def test_no_copy_of_the_integers_is_kept(group):
    """What stays for the backward is smaller than a map of a million numbers in fp32, and gradients are as without."""
    made, x = Rounded(nn.Linear(1024, 1024), 4, group), torch.randn(3, 1024, requires_grad=True)
    held = []

    def note(t):
        held.append(t.numel() * t.element_size() if t.data_ptr() != made.ints.data_ptr() else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = made(x)
    assert sum(held) < 2**18
    wanted = linear_of(x, made)
    torch.testing.assert_close(y, wanted)
    inputs = [x, made.change]
    for own, plain in zip(*(torch.autograd.grad(t.square().sum(), inputs) for t in (y, wanted)), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def linear_of(x, made):
    return torch.nn.functional.linear(x, made.weight(), made.base_layer.bias)


def test_in_fp16_sums_stay_in_range():
    """A row (-0.01, 0.14, 0.14, ...): s0 = 0.01, Q = (-1, 14, ...); 1024 inputs of 8 bring 14 * 8 * 1023 > 65504."""
    original = linear([[-0.01] + [0.14] * 1023]).half()
    y = Rounded(original, 4, 0)(torch.full((1, 1024), 8.0, dtype=torch.float16))
    torch.testing.assert_close(y.float(), torch.tensor([[8 * (0.14 * 1023 - 0.01)]]), rtol=2e-3, atol=0)


def test_a_scale_does_not_fall_below_0():
    made = Rounded(linear([[-1.0, 2.0]]), 2, 0)
    with torch.no_grad():
        made.change.fill_(-5.0)
    assert made.scales().item() == pytest.approx(0.01)


@pytest.mark.parametrize("group", [0, 16])
def test_the_change_is_the_rounded_base_stretched(group, tiny_model, tokenizer, rows, token_rows):
    """W' - Q s0 = diag(ds / s0) Q s0, for each group, the integers stay, and folded in it computes the same."""
    method = hf.PEQA(group_size=group)
    model = run([method], tiny_model(), tokenizer, rows, 6, learning_rate=2e-4).model
    for name, module in replaced_in(model).items():
        before = tiny_model().get_submodule(name).weight
        ints, scale = rounded(before.detach(), 4, group)
        assert torch.equal(module.ints, ints) and torch.equal(module.scale, scale)
        at_start = (ints.view(*scale.shape, -1) * scale[..., None]).view_as(ints)
        ratio = (module.change.view_as(scale) / scale).repeat_interleave(ints.shape[1] // scale.shape[1], 1)
        torch.testing.assert_close(module.weight() - at_start, ratio * at_start, rtol=1e-4, atol=1e-6)
        assert module.change.abs().max() > 1e-4
    tuned = forward(model, token_rows)[1]
    merge(model, method)
    torch.testing.assert_close(forward(model, token_rows)[1], tuned, rtol=1e-4, atol=1e-5)


def test_step_0_is_the_rounded_base_and_off_is_the_base(tiny_model, start, token_rows):
    base = forward(tiny_model(), token_rows)[1]
    coarse, fine = (start([hf.PEQA(bits=b)], tiny_model()) for b in (2, 7))
    far, near = (forward(s.model, token_rows)[1] - base for s in (coarse, fine))
    assert near.abs().max() > 0 and far.norm() > 5 * near.norm()
    with switched_off(coarse.model):
        assert torch.equal(forward(coarse.model, token_rows)[1], base)
    assert sum(p.numel() for p in coarse.params.values()) == 2 * 256  # a number a row


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen2", "gemma3_text"])
def test_other_architectures(kind, start, token_rows):
    model = zoo.build(kind).eval()
    base = forward(model, token_rows)[1]
    start([hf.PEQA(bits=7)], model)
    after = forward(model.eval(), token_rows)[1]
    assert not torch.equal(after, base)
    assert torch.nn.functional.cosine_similarity(after, base, dim=-1).min() > 0.9


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"bits": 8}, "bits is 8"),
        ({"bits": 1}, "bits is 1"),
        ({"group_size": -1}, "group_size is -1"),
        ({"group_size": 24}, "has rows of 32 numbers"),
    ],
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        hf.PEQA(**settings).check(Context(tiny_model(), tokenizer))
