"""Bottleneck adapters: the three forms by hand, where they stand, and that switched off they are gone."""

import pytest
import torch
from torch import nn

import zoo
from cases import run
from holdfast import methods as hf
from holdfast.engine.forward import forward
from holdfast.engine.replaced import replaced_in, switched_off
from holdfast.errors import PlanError
from holdfast.methods.adapt._bottleneck import Bottleneck
from holdfast.methods.adapt.bottleneck_adapter import Adapted
from holdfast.services import Context


class Double(nn.Module):
    """A part of a block: x -> 2 x, in a tuple as attention gives it."""

    def forward(self, hidden_states):
        return 2 * hidden_states, "weights"


def bottleneck():
    """D = (1, -1), b_d = 1, U = (3, 0)^T, b_u = (0, 5), ReLU."""
    made = Bottleneck(2, 1, "relu", torch.zeros(1))
    with torch.no_grad():
        made.down.weight.copy_(torch.tensor([[1.0, -1.0]]))
        made.down.bias.fill_(1.0)
        made.up.weight.copy_(torch.tensor([[3.0], [0.0]]))
        made.up.bias.copy_(torch.tensor([0.0, 5.0]))
    return made


X = torch.tensor([[[4.0, 1.0]]])


def test_behind_by_hand():
    """2 x = (8, 2); D h + b_d = 8 - 2 + 1 = 7; g = (21, 5); h = (29, 7). d sum h / d U = f(D h + b_d) = 7."""
    made = Adapted(Double(), bottleneck())
    out, weights = made(hidden_states=X)
    assert out.tolist() == [[[29.0, 7.0]]] and weights == "weights"
    (grad,) = torch.autograd.grad(out.sum(), [made.adapter.up.weight])
    assert grad.tolist() == [[7.0], [7.0]]


def test_beside_by_hand():
    """D x + b_d = 4 - 1 + 1 = 4; g(x) = (12, 5); h = 2 x + 0.5 g(x) = (14, 4.5)."""
    out, _ = Adapted(Double(), bottleneck(), 0.5)(X)
    assert out.tolist() == [[[14.0, 4.5]]]


def test_a_bottleneck_begins_as_nothing():
    made = Bottleneck(8, 2, "gelu", torch.zeros(1))
    assert not made(torch.ones(3, 8)).any() and 0 < made.down.weight.std() < 0.03


PLACES = {"houlsby": {"self_attn", "mlp"}, "pfeiffer": {"mlp"}, "parallel": {"mlp"}}


@pytest.mark.parametrize("form", PLACES)
def test_step_0_is_the_base_and_the_count_is_as_said(form, tiny_model, start, token_rows):
    """d = 32, k = 8: 2 * 32 * 8 + 32 + 8 = 552 numbers at each place of 2 layers."""
    base = forward(tiny_model(), token_rows)[1]
    session = start([hf.BottleneckAdapter(form=form, reduction_factor=4)], tiny_model())
    assert torch.equal(forward(session.model, token_rows)[1], base)
    assert {n.rsplit(".", 1)[-1] for n in replaced_in(session.model)} == PLACES[form]
    assert sum(p.numel() for p in session.params.values()) == 552 * 2 * len(PLACES[form])


def test_parallel_reads_what_the_net_reads(tiny_model, tokenizer, rows, token_rows):
    """What is added depends on the input alone: with the net of the layer cut it is still there."""
    model = run(
        [hf.BottleneckAdapter(form="parallel", scale=3.0)], tiny_model(), tokenizer, rows, 6, learning_rate=0.01
    ).model
    part = model.model.layers[0].mlp
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(part(x) - part.base_layer(x), 3.0 * part.adapter(x), rtol=1e-4, atol=1e-6)
        assert part.adapter(x).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mixtral", "gpt2", "gpt_neox", "phi3", "bloom", "lfm2"])
def test_other_architectures(kind, start, token_rows):
    """Tuples, several names, experts, no attention in some layers: step 0 is the base, and off is at any time."""
    model = zoo.build(kind).eval()
    base = forward(model, token_rows)[1]
    session = start([hf.BottleneckAdapter()], model)
    assert torch.equal(forward(model.eval(), token_rows)[1], base)
    with torch.no_grad():
        for p in session.params.values():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(forward(model, token_rows)[1], base, atol=1e-3)
        with switched_off(model):
            assert torch.equal(forward(model, token_rows)[1], base)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"form": "serial"}, "'serial'"),
        ({"activation": "tanh"}, "'tanh'"),
        ({"reduction_factor": 0.5}, "reduction_factor is 0.5"),
        ({"scale": 0.0}, "scale is 0"),
    ],
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        hf.BottleneckAdapter(**settings).check(Context(tiny_model(), tokenizer))


def test_a_model_without_such_parts_is_refused(tokenizer):
    with pytest.raises(PlanError, match="no feed-forward part in the blocks of OPT"):
        hf.BottleneckAdapter().check(Context(zoo.build("opt"), tokenizer))
