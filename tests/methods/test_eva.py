"""EVA: A against a plain SVD of the inputs, ranks against a count of the largest shares of variance."""

from collections import Counter

import pytest
import torch

import zoo
from cases import run
from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.methods import EVA, WiSEFT
from holdfast.methods.adapt._adapter import layers
from holdfast.methods.adapt._inputs import task_rows
from holdfast.methods.adapt.eva import filled, padded
from holdfast.services import Context

SMALL = {"r": 4, "lora_alpha": 8}


def ranks(model):
    return {n: m.r["default"] for n, m in layers(model).items()}


def test_a_is_the_main_directions_by_hand(tiny_model, tokenizer, rows):
    """Of one row's inputs: the first is the first right singular vector, and three hold nearly all that three can."""
    model, name = tiny_model(), "model.layers.0.self_attn.q_proj"
    ctx = Context(model, tokenizer, 0, rows, max_length=512)
    (row,) = task_rows(ctx, "EVA", 1, 256)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(row.ids)))
    x = x - x.mean(0)
    wanted = torch.linalg.svd(x)
    a = EVA(r=3, rho=1.0, target_modules=(name,), samples=1, use_label_mask=False).prepare(ctx)[f"A/{name}"]
    assert (a[0] @ wanted.Vh[0]).abs() > 0.999
    assert 0.97 < (x @ a.T).square().sum() / wanted.S[:3].square().sum() < 1.00001


def test_maps_that_are_given_tokens_end_to_end(start, tokenizer, rows):
    """OPT flattens what goes into fc1: there A's first row is the main direction of the row's inputs too."""
    model, name, seen = zoo.build("opt").eval(), "model.decoder.layers.0.fc1", []
    (row,) = task_rows(Context(model, tokenizer, 0, rows, max_length=512), "EVA", 1, 256)
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor(row.ids)[None])
    handle.remove()
    assert seen[0].ndim == 2
    method = EVA(r=3, rho=1.0, target_modules=(name,), samples=1, use_label_mask=False)
    a = method.prepare(Context(model, tokenizer, 0, rows))[f"A/{name}"]
    assert (a[0] @ torch.linalg.svd(seen[0] - seen[0].mean(0)).Vh[0]).abs() > 0.99
    assert len(start([EVA(**SMALL)], zoo.build("opt"), rows=rows).state["EVA"]) == 6 * zoo.LAYERS


def test_the_adapter_is_in_fp32_over_a_bf16_base(tiny_model, start, rows):
    """As with LoRA, at maps of every rank; A is what was found, to the last bit."""
    session = start([EVA(**SMALL, rho=2.0)], tiny_model().to(torch.bfloat16), rows=rows)
    assert len(set(ranks(session.model).values())) > 1
    for name, module in layers(session.model).items():
        a, b = (m["default"].weight for m in (module.lora_A, module.lora_B))
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, session.state["EVA"][f"A/{name}"]) and not b.any(), name


def test_the_head_may_get_an_adapter(tiny_model, tokenizer, rows):
    found = EVA(r=3, target_modules=("lm_head",)).prepare(Context(tiny_model(tied=False), tokenizer, 0, rows))
    assert found["A/lm_head"].shape == (3, 32)


def test_ranks_are_shared_out(tiny_model, start, rows):
    """Together as many as LoRA's, unequal, at most rho * r; the scale is the same for all."""
    session = start([EVA(**SMALL, rho=2.0)], tiny_model(), rows=rows)
    found, state = ranks(session.model), session.state["EVA"]
    assert sum(a.shape[0] for a in state.values()) == 4 * 14 == sum(found.values())
    assert len(Counter(found.values())) > 1 and max(found.values()) <= 8
    for name, module in layers(session.model).items():
        a, b = (m["default"].weight for m in (module.lora_A, module.lora_B))
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-5, rtol=0)
        assert torch.equal(a, state[f"A/{name}"]) and not b.any()
        assert module.scaling["default"] == pytest.approx(2.0), name
    assert set(ranks(start([EVA(**SMALL, rho=1.0)], tiny_model(), rows=rows).model).values()) == {4}


def test_ranks_follow_the_largest_shares_of_variance(tiny_model, tokenizer, rows):
    """Two maps, three ranks each on average: six go to the largest of all shares S_i^2 / sum S^2 of a plain SVD."""
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    model, seen = tiny_model(), {n: [] for n in names}
    ctx = Context(model, tokenizer, 0, rows, max_length=512)
    found = EVA(r=3, rho=2.0, target_modules=names, use_label_mask=False).prepare(ctx)
    for name in names:
        hook = lambda _m, args, name=name: seen[name].append(args[0].flatten(0, -2))  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for row in task_rows(ctx, "EVA", 256, 256):
            model(torch.tensor(row.ids)[None])
    inputs = {n: torch.cat(x) for n, x in seen.items()}
    s = {n: torch.linalg.svdvals(x - x.mean(0)).square() for n, x in inputs.items()}
    shares = sorted(((float(v), n) for n, own in s.items() for v in (own / own.sum())[:6]), reverse=True)
    assert shares[5][0] > 1.02 * shares[6][0]  # else rounding decides
    wanted = Counter(n for _, n in shares[:6])
    assert {n: len(found[f"A/{n}"]) for n in names} == {n: wanted[n] for n in names} and len(set(wanted.values())) == 2


def test_a_map_of_rank_0_gets_no_adapter(tiny_model, start, rows, token_rows):
    session = start([EVA(r=1, rho=12.0, use_label_mask=False)], tiny_model(), rows=rows)
    none = [k for k, a in session.state["EVA"].items() if not len(a)]
    assert none and not {k.removeprefix("A/") for k in none} & set(layers(session.model))
    assert torch.equal(forward(session.model, token_rows)[1], forward(tiny_model(), token_rows)[1])


def test_scaling_back_is_exact(tiny_model, tokenizer, rows):
    got = run([EVA(**SMALL), WiSEFT(alpha=0.0)], tiny_model(), tokenizer, rows, 3)
    assert all(not w.any() for n, w in got.weights.items() if ".lora_B." in n)


def test_a_batch(token_rows):
    """Rows of 9 and 4 tokens, the last halves of which are scored."""
    batch = padded(token_rows[:2])
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 4 + [0] * 5]
    ids, labels = batch["input_ids"][1].tolist(), batch["labels"][1].tolist()
    assert ids[:4] == token_rows[1].ids.tolist() and labels == [-100, -100, *ids[2:4], *[-100] * 5]


def test_batches_are_filled(token_rows):
    """Rows of 9, 4, 14 and 6 tokens, 5, 2, 7 and 3 of them scored: none is left behind."""
    assert [len(b) for b in filled(token_rows, 17, True)] == [4]
    assert filled(token_rows, 18, True) == [] and len(filled(token_rows, 18, False)) == 1
    sizes = [sum(len(r.ids) for r in b) for b in filled(token_rows * 250, 17, True)]  # 8250 tokens
    assert sizes == [124 * 33 + 9, 4096, 53]


@pytest.mark.parametrize(
    ("wrong", "words"), [({"rho": 0.5}, "rho"), ({"tau": 0.0}, "tau"), ({"r": 0}, "rank"), ({"r": 17}, "32 inputs")]
)
def test_values_that_make_no_sense(wrong, words, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=words):
        EVA(**wrong).check(Context(tiny_model(), tokenizer))


def test_what_cannot_be_found_is_named(tiny_model, tokenizer, rows):
    with pytest.raises(PlanError, match="no text of them"):
        EVA(**SMALL).prepare(Context(tiny_model(), tokenizer))
    ctx = Context(tiny_model(), tokenizer, 0, rows)
    with pytest.raises(PlanError, match="1 rows have fewer tokens"):
        EVA(**SMALL, samples=1).prepare(ctx)


def test_directions_that_do_not_settle_are_taken_and_told(tiny_model, tokenizer, rows):
    """PEFT alone would go over the same rows for ever: none of these cosines is 1 to the last bit."""
    found = {}
    for tau, passes in ((1.0, 1), (1.0, 4), (0.9, 50)):
        ctx = Context(tiny_model(), tokenizer, 0, rows)
        found[tau, passes] = EVA(**SMALL, tau=tau, passes=passes).prepare(ctx)
        told = [n for n in ctx.notes if "did not all settle" in n]
        assert bool(told) == (tau == 1.0) and (not told or f"in {passes} passes over 24 rows" in told[0])
    assert all(sum(len(a) for a in state.values()) == 4 * 14 for state in found.values())
