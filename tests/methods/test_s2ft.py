"""S2FT: the slices by hand, whole heads under grouped queries, and that they are training columns and rows alone."""

import pytest
import torch
from torch import nn

import zoo
from cases import run
from holdfast import methods as hf
from holdfast.engine.forward import forward
from holdfast.engine.replaced import replaced_in, switched_off
from holdfast.errors import PlanError
from holdfast.methods.adapt.s2ft import Slices, channels, drawn
from holdfast.services import Context
from holdfast.sites.replace import merge

ALL = {"d_ratio": 0.2, "u_ratio": 0.1, "o_ratio": 0.5, "v_ratio": 0.5}


def linear(weight):
    made = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
    return made


def slices(index, columns, values):
    made = Slices(linear([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor(index), columns=columns)
    with torch.no_grad():
        made.slices.copy_(torch.tensor(values))
    return made


X = torch.tensor([[1.0, 10.0, 100.0]])


def test_columns_by_hand():
    """W x = (321, 654). I = {0, 2}: S x[I] = (1 * 1 + 0 * 100, 0 * 1 + 2 * 100) = (1, 200).

    d sum y / d S = x[I] in every row: (1, 100).
    """
    made = slices([0, 2], True, [[1.0, 0.0], [0.0, 2.0]])
    y = made(X)
    assert y.tolist() == [[322.0, 854.0]]
    (grad,) = torch.autograd.grad(y.sum(), [made.slices])
    assert grad.tolist() == [[1.0, 100.0], [1.0, 100.0]]
    assert made.folded().weight.tolist() == [[2.0, 2.0, 3.0], [4.0, 5.0, 8.0]]


def test_rows_by_hand():
    """I = {1}: S x = 1 * 1 + 1 * 10 + 0 * 100 = 11 joins y[1] = 654. d y[1] / d S = x."""
    made = slices([1], False, [[1.0, 1.0, 0.0]])
    y = made(X)
    assert y.tolist() == [[321.0, 665.0]]
    (grad,) = torch.autograd.grad(y.sum(), [made.slices])
    assert grad.tolist() == X.tolist()
    assert made.folded().weight.tolist() == [[1.0, 2.0, 3.0], [5.0, 6.0, 6.0]]


def test_units_become_channels():
    """Heads 2 and 0, four numbers wide."""
    assert channels([2, 0], 4).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert channels([3, 1], 1).tolist() == [1, 3]


def test_units_are_drawn_over_all_layers_together():
    order = drawn({"a": 50, "b": 50}, "x")
    assert sorted(order) == [(p, n) for p in "ab" for n in range(50)]
    first = [place for place, _ in order[:30]]
    assert 5 < first.count("a") < 25 and order == drawn({"a": 50, "b": 50}, "x") != drawn({"a": 50, "b": 50}, "y")


def test_a_head_is_whole_under_grouped_queries(tiny_model):
    """4 query heads over 2 key-value heads, 8 wide: head g has rows 8 g of v and columns 16 g of o, those of its two
    query heads. By key-value heads read as query heads, as the official code does it, o would have 8 columns of them.
    """
    model = tiny_model()
    state = hf.S2FT(**{**ALL, "o_ratio": 0.25, "v_ratio": 0.5}).prepare(Context(model, None))
    o, v = ({n.split(".")[2]: i for n, i in state.items() if n.endswith(x)} for x in ("o_proj", "v_proj"))
    assert sum(map(len, o.values())) == 16 and sum(map(len, v.values())) == 16  # 1 and 2 of the 4 heads in 2 layers
    for layer, columns in o.items():
        for g in {int(c) // 16 for c in columns}:
            assert set(range(16 * g, 16 * g + 16)) <= set(columns.tolist())
            assert set(range(8 * g, 8 * g + 8)) <= set(v[layer].tolist())  # nested: coupled parts train together


@torch.no_grad()
def test_only_the_chosen_heads_reach_the_output(tiny_model):
    """Cutting the key-value heads that are not chosen leaves exactly the chosen columns of o something to read."""
    model = tiny_model(layers=1)
    state = hf.S2FT(d_ratio=0.0, o_ratio=0.5, v_ratio=0.5).prepare(Context(model, None))
    layer = model.model.layers[0].self_attn
    rows, columns = state["model.layers.0.self_attn.v_proj"], state["model.layers.0.self_attn.o_proj"]
    kept = torch.zeros(16, 1).index_fill(0, rows, 1.0)
    layer.v_proj.weight.mul_(kept)
    seen = []
    layer.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(torch.arange(7, 17)[None])
    assert (seen[0].abs().amax((0, 1)) > 0).nonzero()[:, 0].tolist() == columns.tolist()


def test_gradients_are_those_of_the_columns_and_rows_alone(tiny_model, start, token_rows, gradients):
    session = start([hf.S2FT(**ALL)], tiny_model())
    loss, ours = gradients(session, token_rows)
    whole, dense = gradients(start([], tiny_model()), token_rows)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert len(ours) == len(session.state["S2FT"]) > 4
    for name, index in session.state["S2FT"].items():
        dim = 1 if name.endswith(("down_proj", "o_proj")) else 0
        wanted = dense[f"{name}.weight"].index_select(dim, index)
        torch.testing.assert_close(ours[f"{name}.slices"], wanted, rtol=1e-4, atol=1e-7)


def test_step_0_is_the_base_and_the_count_is_as_said(tiny_model, start, token_rows):
    """d: 26 of 128 channels, 32 numbers each; u: 13; o: 2 of 4 heads, 16 columns of 32; v: 2 heads, 8 rows of 32."""
    base = forward(tiny_model(), token_rows)[1]
    session = start([hf.S2FT(**ALL)], tiny_model())
    assert torch.equal(forward(session.model, token_rows)[1], base)
    assert sum(p.numel() for p in session.params.values()) == (26 + 13) * 32 + 2 * 16 * 32 + 2 * 8 * 32


def test_folded_in_it_is_a_plain_model(tiny_model, tokenizer, rows, token_rows):
    method = hf.S2FT(**ALL)
    model = run([method], tiny_model(), tokenizer, rows, 6, learning_rate=0.01).model
    tuned = forward(model, token_rows)[1]
    with switched_off(model):
        base = forward(model, token_rows)[1]
    merge(model, method)
    assert not replaced_in(model)
    torch.testing.assert_close(forward(model, token_rows)[1], tuned, rtol=1e-5, atol=1e-6)
    assert (tuned - base).abs().max() > 1e-3


@pytest.mark.parametrize("kind, parts", [("opt", {"fc2"}), ("gemma3_text", {"down_proj"}), ("phi3", {"down_proj"})])
def test_other_architectures(kind, parts, tokenizer, token_rows, start):
    model = zoo.build(kind).eval()
    base = forward(model, token_rows)[1]
    session = start([hf.S2FT(d_ratio=0.5)], model)
    assert {n.rsplit(".", 1)[-1] for n in session.state["S2FT"]} == parts
    assert torch.equal(forward(session.model.eval(), token_rows)[1], base)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"d_ratio": 1.5}, "d_ratio is 1.5"),
        ({"d_ratio": 0.0}, "trains nothing"),
        ({"v_ratio": -0.1}, "v_ratio is -0.1"),
    ],
)
def test_values_without_meaning_are_refused(settings, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        hf.S2FT(**settings).check(Context(tiny_model(), tokenizer))


def test_a_part_that_is_not_there_is_refused(tokenizer):
    with pytest.raises(PlanError, match=r"v_ratio asks for v maps"):
        hf.S2FT(v_ratio=0.5).check(Context(zoo.build("phi3"), tokenizer))
