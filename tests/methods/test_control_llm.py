"""Control LLM: the mixture and the divergence by hand, and what the pairs promise on a real model."""

import copy

import pytest
import torch
from torch import nn

from cases import run
from holdfast import methods as hf
from holdfast.engine.forward import forward
from holdfast.engine.pack import pack, token_row
from holdfast.engine.replaced import collecting, replaced_in
from holdfast.errors import PlanError
from holdfast.methods.adapt.control_llm import Pair, cosine, mse
from holdfast.services import Context, View


class Times(nn.Module):
    """A layer of one number: x -> number * x."""

    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))

    def forward(self, x):
        return self.number * x


def pair(frozen, copied, **settings):
    """A pair on 2-d states whose copy went from `frozen` to `copied`."""
    made = Pair(Times(frozen), 0, 1, 2, hf.ControlLLM(**settings))
    with torch.no_grad():
        made.expanded.number.fill_(copied)
    return made


X = torch.tensor([[[1.0, 2.0]]])  # (B, L, D)


def test_lerp_by_hand():
    """x = (1, 2): h_p = 1 x = (1, 2), h_e = 3 x = (3, 6); h = h_p + 0.25 (h_e - h_p) = (1.5, 3).

    div = ((3 - 1)^2 + (6 - 2)^2) / 2 = 10. d h / d number = 0.25 x, so sum h gives 0.25 (1 + 2) = 0.75;
    d div / d number = 2 / 2 * ((3 - 1) * 1 + (6 - 2) * 2) = 10.
    """
    made = pair(1.0, 3.0, share=0.25)
    with collecting() as handed:
        out = made(X)
    (divergence,) = handed["divergence"]
    assert torch.equal(out, torch.tensor([[[1.5, 3.0]]])) and divergence.tolist() == [[10.0]]
    (from_states,) = torch.autograd.grad(out.sum(), [made.expanded.number], retain_graph=True)
    (from_term,) = torch.autograd.grad(divergence.sum(), [made.expanded.number])
    assert from_states.item() == 0.75 and from_term.item() == 10.0


def test_the_frozen_branch_is_a_fixed_aim():
    """d div / d x: with h_p = (1, 2) fixed and h_e = 3 x, 2 / 2 * (3 - 1, 6 - 2) * 3 = (6, 12); through both it
    would be (4, 8)."""
    x = X.clone().requires_grad_()
    with collecting() as handed:
        pair(1.0, 3.0)(x)
    (grad,) = torch.autograd.grad(handed["divergence"][0].sum(), [x])
    assert grad.tolist() == [[[6.0, 12.0]]]


def test_cosine_by_hand():
    """aim (1, 0), states (3, 4): cos = 3 / 5, so 0.4. d cos / d h = (aim - cos h / |h|) / |h|
    = ((1, 0) - 0.6 (0.6, 0.8)) / 5 = (0.128, -0.096); the divergence falls along it."""
    states = torch.tensor([3.0, 4.0], requires_grad=True)
    value = cosine(torch.tensor([1.0, 0.0]), states)
    (grad,) = torch.autograd.grad(value, [states])
    torch.testing.assert_close(value, torch.tensor(0.4))
    torch.testing.assert_close(grad, torch.tensor([-0.128, 0.096]))
    assert mse(torch.tensor([1.0, 0.0]), states).item() == (2**2 + 4**2) / 2


def test_dlerp_by_hand():
    """w = (ln 3, 0, 0, 0), b = 0, [h_p; h_e] = (1, 2, 3, 6): a = sigmoid(ln 3) = 3 / 4, h = (2.5, 5).

    d a / d w = a (1 - a) [h_p; h_e] = 3 / 16 (1, 2, 3, 6), and d sum h / d a = 2 + 4 = 6: 18 / 16 (1, 2, 3, 6).
    """
    made = pair(1.0, 3.0, mixture="dlerp")
    torch.testing.assert_close(made(X), torch.tensor([[[2.0, 4.0]]]))  # half of each at the start
    with torch.no_grad():
        made.gate.weight[0, 0] = torch.tensor(3.0).log()
    out = made(X)
    torch.testing.assert_close(out, torch.tensor([[[2.5, 5.0]]]))
    (grad,) = torch.autograd.grad(out.sum(), [made.gate.weight])
    torch.testing.assert_close(grad, torch.tensor([[1.0, 2.0, 3.0, 6.0]]) * 18 / 16)


def test_the_term_is_a_mean_over_layers_at_the_answer():
    """Two layers, a row of 4 tokens whose last 2 are scored; states 1 and 2 give them:
    3 (2 + 20) / 2 = 33 and 3 (3 + 30) / 2 = 49.5."""
    handed = {"divergence": [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])]}
    packed = pack([token_row([5, 6, 7, 8], 2)])
    view = View(packed, torch.zeros(2, 9), 0, None, {}, None, "ControlLLM", {}, {}, {}, handed=handed)
    term = hf.ControlLLM(weight=3.0).loss(view)
    assert term.owner == "task" and term.value.tolist() == [33.0, 49.5]


# ---- on a model


@pytest.mark.parametrize(
    "every, count, taken",
    [
        (4, 32, [3, 7, 11, 15, 19, 23, 27, 31]),
        (4, 30, [3, 7, 11, 16, 20, 24, 29]),
        (1, 3, [0, 1, 2]),
        (4, 2, [1]),
    ],
)
def test_the_last_layer_of_each_part(every, count, taken):
    assert hf.ControlLLM(every=every).layers(count) == taken


@pytest.mark.parametrize("settings", [{}, {"mixture": "dlerp", "divergence": "cosine"}], ids=["lerp", "dlerp"])
def test_step_0_is_the_base(settings, tiny_model, start, token_rows):
    model, base = tiny_model(layers=4), tiny_model(layers=4)
    session = start([hf.ControlLLM(every=2, **settings)], model)
    assert torch.equal(forward(model, token_rows)[1], forward(base, token_rows)[1])
    parts = session.probe(token_rows)
    assert abs(parts["ControlLLM"]) < (1e-6 if settings else 1e-30)
    layer = sum(p.numel() for p in base.model.layers[0].parameters())
    gate = 2 * base.config.hidden_size + 1 if settings else 0
    assert sum(p.numel() for p in session.params.values()) == 2 * (layer + gate)
    assert list(replaced_in(model)) == ["model.layers.1", "model.layers.3"]


@pytest.mark.parametrize("divergence, weight", [("mse", 1e5), ("cosine", 100.0)])
def test_the_divergence_grows_from_0_and_the_weight_holds_it(divergence, weight, tiny_model, tokenizer, rows):
    free, held = (
        run([hf.ControlLLM(every=1, divergence=divergence, weight=w)], tiny_model(), tokenizer, rows, 12).log.loss
        for w in (1e-3, weight)
    )
    assert abs(free[0][1]["ControlLLM"]) < 1e-6 and free[-1][1]["ControlLLM"] > 0
    assert held[-1][1]["ControlLLM"] / weight < 0.5 * free[-1][1]["ControlLLM"] / 1e-3


def test_a_share_of_0_is_the_base_at_any_time(tiny_model, tokenizer, rows, token_rows):
    tuned = run([hf.ControlLLM(every=1)], tiny_model(), tokenizer, rows, 6).model
    base = forward(tiny_model(), token_rows)[1]
    assert not torch.equal(forward(tuned, token_rows)[1], base)
    for module in replaced_in(tuned).values():
        module.share = 0.0
    assert torch.equal(forward(tuned, token_rows)[1], base)


def test_a_gate_learns(tiny_model, tokenizer, rows):
    tuned = run([hf.ControlLLM(every=1, mixture="dlerp")], tiny_model(), tokenizer, rows, 6)
    gates = [w for n, w in tuned.weights.items() if ".gate." in n]
    assert len(gates) == 4 and all(w.abs().max() > 0 for w in gates)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"every": 0}, "every is 0"),
        ({"mixture": "slerp"}, "'slerp'"),
        ({"divergence": "kl"}, "'kl'"),
        ({"share": 0.0}, "share is 0.0"),
        ({"weight": -1.0}, "weight is -1.0"),
    ],
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        hf.ControlLLM(**settings).check(Context(tiny_model(), tokenizer))


def test_a_copy_obeys_the_switch_of_attention(tiny_model, start):
    """Attention is switched at the model's configuration, which a plain deep copy would leave behind."""
    model = tiny_model()
    start([hf.ControlLLM(every=2)], model)
    attention = model.model.layers[1].expanded.self_attn
    assert attention.config is model.config and copy.deepcopy(attention).config is not model.config
