"""Every way of attention over packed rows gives what the model gives for each row alone, forward and backward."""

import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from holdfast.engine import attention
from holdfast.engine.attention import Wants, _Gather, _Spread, choose, only, packed_attention
from holdfast.engine.forward import can_pack, forward
from holdfast.engine.layout import BOUND, CELLS, Layout
from holdfast.engine.pack import token_row

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
MODELS = {
    "Llama": {},
    "Llama, odd heads": {"head_dim": 6},
    "Mistral": {"sliding_window": 5},
    "Phi3": {"sliding_window": 5},
    "Gemma3Text": {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma2": {"sliding_window": 5, "head_dim": 8, "attn_logit_softcapping": 2.0},
    "GptOss": {"sliding_window": 5, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
BF16, CUDA = torch.bfloat16, torch.device("cuda")


@pytest.fixture(scope="module")
def kernel():
    """The stand-in for torch's kernel that the benchmarks count with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield __import__("stand_in").varlen_attn
        sys.modules.pop("stand_in")


def build(name):
    family = name.split(",")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(getattr(hf, family + "Config")(**SMALL | MODELS[name])).eval()
    with torch.no_grad():
        for p in model.parameters():  # default random weights hardly look at what is before them
            if p.ndim >= 2:
                p.mul_(4)
    return model


def rows(lengths=(7, 33, 2, 12, 300)):
    draw = torch.Generator().manual_seed(1)
    return [token_row(torch.randint(3, 300, (n,), generator=draw).tolist(), 1) for n in lengths]


def loss_and_grads(model, logits):
    loss = (logits.float().log_softmax(-1)[:, ::7] ** 2).sum() / 100
    wanted = [p for p in model.parameters() if p.requires_grad]
    return logits, torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("way", ["blocks", "fixed", "varlen"])
@pytest.mark.parametrize("name", MODELS)
def test_each_way_is_the_models_own_of_each_row(name, way, kernel):
    model = build(name)
    alone = [model(torch.tensor(r.ids)[None], use_cache=False).logits[0, :-1] for r in rows()]
    expected, grads = loss_and_grads(model, torch.cat(alone))
    with only(way, kernel):
        assert can_pack(model)
        got, own = loss_and_grads(model, forward(model, rows())[1])
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    for a, b in zip(own, grads, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("way", ["fixed", "varlen"])
def test_it_is_so_under_autocast(way, kernel):
    model = build("Mistral")
    with torch.autocast("cpu", BF16):
        expected = forward(model, rows())[1]
        with only(way, kernel):
            got = forward(model, rows())[1]
    assert (got - expected).abs().max() < 0.05 * expected.std()


def test_a_window_that_layers_keep_to_themselves_is_not_packed(monkeypatch):
    """The configuration says there is one; packed attention would not hear of it."""
    model = build("Mistral")
    heard = packed_attention

    def deaf(*args, sliding_window=None, **more):
        return heard(*args, **more)

    monkeypatch.setitem(hf.AttentionInterface._global_mapping, attention.ATTENTION, deaf)
    assert not can_pack(model)


# ---- the choice


@pytest.mark.parametrize(
    ("flash", "varlen", "card", "dtype", "head", "wants", "way"),
    [
        (True, True, (9, 0), BF16, 64, {"dropout": 0.1}, "flash"),
        (True, True, (9, 0), BF16, 64, {"cap": 50.0}, "flash"),
        (True, True, (9, 0), BF16, 64, {"sinks": torch.ones(1)}, "fixed"),
        (True, True, (9, 0), torch.float32, 64, {}, "fixed"),
        (True, True, (7, 5), torch.float16, 64, {}, "fixed"),
        (True, True, (9, 0), BF16, 512, {}, "fixed"),
        (False, True, (9, 0), BF16, 64, {"window": 9}, "varlen"),
        (False, True, (9, 0), BF16, 64, {"dropout": 0.1}, "fixed"),
        (False, True, (9, 0), BF16, 64, {"cap": 50.0}, "fixed"),
        (False, False, (9, 0), BF16, 64, {}, "fixed"),
    ],
)
def test_what_is_chosen_on_cuda(monkeypatch, flash, varlen, card, dtype, head, wants, way):
    monkeypatch.setattr(attention, "_has_flash", lambda: flash)
    monkeypatch.setattr(attention, "_varlen", lambda: varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card)
    assert choose(CUDA, dtype, head, Wants(**wants)) == way
    assert choose(torch.device("cpu"), dtype, head, Wants(**wants)) == "blocks"


def test_torchs_kernel_takes_what_it_is_given(kernel):
    """Names and kinds of arguments of the real one, which runs on CUDA alone."""
    import inspect

    real = attention._varlen()
    assert real is not None, "torch without varlen_attn: CUDA falls back to `fixed`"
    known = inspect.signature(real).parameters
    for name, p in inspect.signature(kernel).parameters.items():
        assert known[name].kind == p.kind, name


# ---- grids


def test_rows_of_similar_length_stand_side_by_side():
    blocks = Layout([100, 3, 90, 2, 60, 1, 70]).blocks
    assert blocks.sizes == [(3, 100), (1, 60), (2, 3), (1, 1)]
    assert blocks.index[blocks.back].tolist() == list(range(326))
    cells = sum(b * w for b, w in blocks.sizes)
    assert len(blocks.back.unique()) == 326 and 326 * 3 >= 2 * cells  # at most a third is padding
    assert blocks.masks(None, BF16) == [None] * 4 and blocks.masks(100, BF16) == [None] * 4
    windowed = blocks.masks(2, BF16)
    assert windowed[0].shape == (1, 1, 100, 100) and windowed[3] is None
    assert (windowed[2][0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [False, True, True]]


def test_few_shapes_hold_rows_of_all_lengths():
    draw, shapes = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        lengths = (2 ** (torch.rand(12, generator=draw) * 12)).long().clamp(1, BOUND[-1]).tolist()
        fixed = Layout(lengths).fixed
        shapes |= set(fixed.sizes)
        assert fixed.index[fixed.back].tolist() == list(range(sum(lengths)))
        assert len(fixed.back.unique()) == sum(lengths)
    assert shapes <= {(CELLS // w, w) for w in BOUND}
    assert Layout([5000]).fixed.sizes == [(1, 4 * BOUND[-1])]


def test_a_line_of_several_rows_keeps_them_apart():
    fixed = Layout([3, 2]).fixed
    (mask,) = fixed.masks(None, torch.float32)
    height = CELLS // BOUND[0]
    assert mask.shape == (height, 1, BOUND[0], BOUND[0])
    sees = mask[0, 0, :6, :6] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],  # padding sees itself: no row of it is empty, so nothing is nan
    ]


@pytest.mark.parametrize("kind", ["blocks", "fixed"])
def test_padding_gets_no_gradient(kind):
    """Spread x, weigh every cell (padding too), gather: the gradient is the weight of the real cell alone."""
    grids = getattr(Layout([5, 4]), kind)
    x = torch.randn(9, 2, requires_grad=True)
    cells = _Spread.apply(x, grids)
    for c in cells:
        c.retain_grad()
    sizes = [len(c) for c in cells]
    weight = torch.arange(1.0, 1 + sum(sizes))[:, None]
    out = _Gather.apply(grids, *(c * w for c, w in zip(cells, weight.split(sizes), strict=True)))
    assert torch.equal(out, x * weight[grids.back])
    out.sum().backward()
    real = torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, grids.back, True)
    assert torch.cat([c.grad for c in cells])[~real].eq(0).all()
    assert torch.equal(x.grad, weight[grids.back].expand(9, 2))
