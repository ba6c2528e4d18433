"""CorDA: which parts of a weight are taken, by hand; the start is the base; what is to be kept moves less."""

import json
import random
import weakref

import pytest
import torch

from cases import kl, run
from holdfast.engine.forward import forward
from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.methods import CorDA, LoRA, WiSEFT
from holdfast.methods.adapt._adapter import layers
from holdfast.methods.adapt._inputs import covariances, general_rows, grouped
from holdfast.services import Context

SMALL = {"r": 4, "lora_alpha": 8, "samples": 8, "max_tokens": 32}


def linear(weight):
    m = torch.nn.Linear(*reversed(torch.tensor(weight).shape), bias=False)
    m.weight.data = torch.tensor(weight)
    return m


@pytest.mark.parametrize(("mode", "part"), [("kpm", [0.0, 1.0]), ("ipm", [1.0, 0.0])])
def test_parts_by_hand(mode, part):
    """W = I, covariance diag(3, 1): mean 2, damped by 0.02 to C = diag(3.02, 1.02) = W C.
    The smallest: u = e2, v^T C^-1 = e2^T / 1.02, their product times 1.02 is e2 e2^T; s = 2: B0 A0 is half."""
    a, b = CorDA(r=1, lora_alpha=2, corda_method=mode).parts(
        linear([[1.0, 0.0], [0.0, 1.0]]), torch.diag(torch.tensor([3.0, 1.0]))
    )
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor(part)) / 2)
    value = 1.02 if mode == "kpm" else 3.02
    assert b.abs().max().item() == pytest.approx((value / 2) ** 0.5)
    assert a.abs().max().item() == pytest.approx((value / 2) ** 0.5 / value)


def test_what_is_taken_is_least_and_most():
    """|s B0 A0 C|^2 is the sum of the chosen s_i^2: no r parts have less than kpm's, or more than ipm's."""
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, 5, generator=draw), torch.randn(40, 5, generator=draw)
    cov = x.T @ x
    damped = cov + 0.01 * cov.diag().mean() * torch.eye(5)
    values = torch.linalg.svdvals(w @ damped)
    for mode, wanted in (("kpm", values[-2:]), ("ipm", values[:2])):
        a, b = CorDA(r=2, lora_alpha=3, corda_method=mode).parts(linear(w.tolist()), cov)
        assert (1.5 * b @ a @ damped).square().sum().item() == pytest.approx(wanted.square().sum().item(), rel=1e-3)


def test_covariances_by_hand(tiny_model, tokenizer):
    """Of two rows of unequal length, each scaled by its largest |x| and summed over its tokens; no padding."""
    model = tiny_model()
    ctx, maps = Context(model, tokenizer), {"q": model.model.layers[0].self_attn.q_proj}
    rows = [[0, 5, 9, 30, 7], [0, 8]]
    wanted = 0
    for ids in rows:
        with torch.no_grad():
            x = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
        x = x / x.abs().max()
        wanted = wanted + sum(torch.outer(t, t) for t in x) / 2
    ((_, got),) = covariances(ctx, maps, [token_row(r, 1) for r in rows], "CorDA")
    torch.testing.assert_close(got, wanted)


def test_covariances_in_groups(tiny_model, tokenizer):
    """Widths 32 and 64: 4 KB and 16 KB. Within 8 KB q and k go together, and down, too large, alone."""
    model, seen = tiny_model(), []
    layer = model.model.layers[0]
    maps = {
        "q": layer.self_attn.q_proj,
        "k": layer.self_attn.k_proj,
        "down": layer.mlp.down_proj,
        "up": layer.mlp.up_proj,
    }
    assert [list(g) for g in grouped(maps, 8192)] == [["q", "k"], ["down"], ["up"]]
    ctx, rows = Context(model, tokenizer, tell=lambda done, _: seen.append(done)), [token_row([0, 5, 9], 1)]
    whole, parts = (dict(covariances(ctx, maps, rows, "CorDA", most)) for most in (2**30, 8192))
    assert all(torch.equal(whole[n], parts[n]) for n in maps) and list(whole) == list(maps) == list(parts)
    assert seen == pytest.approx([1, 1 / 3, 2 / 3, 1])


def test_covariances_are_let_go(tiny_model, tokenizer):
    """One at a time: nothing else holds one that was handed out."""
    model = tiny_model()
    maps = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    given = covariances(Context(model, tokenizer), maps, [token_row([0, 5, 9], 1)], "CorDA")
    held = [weakref.ref(covariance) for _, covariance in given]
    assert sum(ref() is not None for ref in held) <= 1


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_the_start_is_the_base(mode, tiny_model, start, rows, token_rows):
    base = forward(tiny_model(), token_rows)[1]
    session = start([CorDA(**SMALL, corda_method=mode)], tiny_model(), rows=rows)
    assert (forward(session.model, token_rows)[1] - base).abs().max() < 1e-5
    with session.model.disable_adapter():
        assert torch.equal(forward(session.model, token_rows)[1], base)
    for name, module in layers(session.model).items():
        assert module.scaling["default"] == 2 and module.r["default"] == 8, name


def test_scaling_back_is_exact(tiny_model, tokenizer, rows):
    """WiSE-FT scales B, the frozen half too: alpha 0 is the base."""
    got = run([CorDA(**SMALL), WiSEFT(alpha=0.0)], tiny_model(), tokenizer, rows, 3)
    assert all(not w.any() for n, w in got.weights.items() if ".lora_B." in n)


def kept(tmp_path, tiny_model, tokenizer, rows, method):
    """(loss of the last step, KL on the text to be kept) of 20 steps; that text lies in 6 of 32 dimensions."""
    draw, text = random.Random(0), tmp_path / "kept.jsonl"
    lines = [" ".join(str(draw.randrange(1000)) for _ in range(12)) for _ in range(40)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    models = []
    for _ in range(2):
        model = tiny_model(tied=False, layers=1)
        keep = general_rows(Context(model, tokenizer, 0, rows), "test", (str(text),), 40, 64)
        used = sorted({int(t) for r in keep for t in r.ids})
        q = torch.linalg.qr(torch.randn(32, 6, generator=torch.Generator().manual_seed(3))).Q
        with torch.no_grad():
            model.model.embed_tokens.weight[used] @= q @ q.T
        models.append(model)
    only = {"r": 4, "lora_alpha": 4, "target_modules": ("q_proj", "k_proj", "v_proj")}
    more = {"sources": (str(text),)} if issubclass(method, CorDA) else {}
    got = run([method(**only, **more)], models[1], tokenizer, rows, 20, learning_rate=2e-3)
    return got.log.loss[-1][1]["task"], kl(models[0], got.model, keep)


def test_what_is_to_be_kept_moves_less(tmp_path, tiny_model, tokenizer, rows):
    """The paper's claim in small: as much is learnt as with LoRA, and the text to be kept changes far less."""
    lora, corda = (kept(tmp_path, tiny_model, tokenizer, rows, m) for m in (LoRA, CorDA))
    assert corda[0] == pytest.approx(lora[0], abs=0.01)
    assert 0 <= corda[1] < 0.05 * lora[1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"corda_method": "both"}, "both"),
        ({"samples": 0}, "samples"),
        ({"sources": ()}, "sources is empty"),
        ({"r": 0}, "rank"),
        ({"r": 17}, "16 directions"),
    ],
)
def test_values_that_make_no_sense(wrong, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        CorDA(**wrong).check(Context(tiny_model(), tokenizer))


def test_what_cannot_be_measured_is_named(tiny_model, tokenizer):
    model = tiny_model()
    ctx = Context(model, tokenizer)
    with pytest.raises(PlanError, match="no text of them"):
        CorDA(**SMALL, corda_method="ipm").prepare(ctx)
    with pytest.raises(PlanError, match="no input of idle"):
        list(covariances(ctx, {"idle": torch.nn.Linear(2, 2)}, [token_row([0, 5], 1)], "CorDA"))


@pytest.mark.parametrize(("value", "words"), [(0.0, "o_proj: its inputs are all 0"), (float("nan"), "o_proj.*finite")])
def test_inputs_that_cannot_be_decomposed_are_named(value, words, tiny_model, tokenizer):
    """PEFT would fail from inside, or double its damping for ever."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(value)
    with pytest.raises(PlanError, match=words):
        CorDA(**SMALL, target_modules=("o_proj",)).prepare(Context(model, tokenizer))
