"""Connected adapters: the sum by hand, and the path from bottom to top."""

import pytest
import torch
from torch import nn

import zoo
from holdfast import methods as hf
from holdfast.engine.forward import forward
from holdfast.engine.replaced import replaced_in, switched_off
from holdfast.errors import ModelError, PlanError
from holdfast.methods.adapt._bottleneck import Bottleneck
from holdfast.methods.adapt.connected_adapter import Connected
from holdfast.services import Context


class Times(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return self.number * x


def bottleneck(up):
    """D = (1, 1), U = (up, 0)^T, no biases: (a, b) -> (up * relu(a + b), 0)."""
    made = Bottleneck(2, 1, "relu", torch.zeros(1))
    with torch.no_grad():
        made.down.weight.fill_(1.0)
        made.up.weight.copy_(torch.tensor([[up], [0.0]]))
    return made


X = torch.tensor([[[1.0, 2.0]]])


def test_by_hand():
    """x = (1, 2): layer 3 x = (3, 6); g of it = (2 * 9, 0); a(x) = (5 * 3, 0); h = (3 + 18 + 15, 6)."""
    assert Connected(Times(3.0), bottleneck(2.0), bottleneck(5.0))(X).tolist() == [[[36.0, 6.0]]]


@pytest.mark.parametrize("linked", [True, False])
def test_there_is_a_path_past_frozen_blocks(linked):
    """Two blocks that give nothing: by the aside of the second the first still reaches the output, and only by it.

    h1 = a1(x) = (u 3, 0) at u = 5: d h2 / d u = d (7 relu(h1)) / d u = 7 * 3 = 21.
    """
    first = Connected(Times(0.0), bottleneck(2.0), bottleneck(5.0))
    second = Connected(Times(0.0), bottleneck(2.0), bottleneck(7.0 if linked else 0.0))
    (grad,) = torch.autograd.grad(second(first(X)).sum(), [first.aside.up.weight])
    assert grad[0].item() == (21.0 if linked else 0.0)


def test_step_0_is_the_base_and_the_count_is_as_said(tiny_model, start, token_rows):
    """d = 32, k = 8: 552 numbers a bottleneck, two of them in each of 2 layers."""
    base = forward(tiny_model(), token_rows)[1]
    session = start([hf.ConnectedAdapter(reduction_factor=4)], tiny_model())
    assert torch.equal(forward(session.model, token_rows)[1], base)
    assert list(replaced_in(session.model)) == ["model.layers.0", "model.layers.1"]
    assert sum(p.numel() for p in session.params.values()) == 4 * 552


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "mixtral"])
def test_other_architectures(kind, start, token_rows):
    model = zoo.build(kind).eval()
    base = forward(model, token_rows)[1]
    session = start([hf.ConnectedAdapter()], model)
    with torch.no_grad():
        for p in session.params.values():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(forward(model.eval(), token_rows)[1], base, atol=1e-3)
        with switched_off(model):
            assert torch.equal(forward(model, token_rows)[1], base)


def test_a_block_of_several_streams_is_refused(start, token_rows):
    session = start([hf.ConnectedAdapter()], zoo.build("gemma3n_text").eval())
    with pytest.raises(ModelError, match="has several"):
        session.probe(token_rows[:1])


@pytest.mark.parametrize(
    "settings, words", [({"activation": "tanh"}, "'tanh'"), ({"reduction_factor": 0.0}, "reduction_factor is 0.0")]
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        hf.ConnectedAdapter(**settings).check(Context(tiny_model(), tokenizer))
