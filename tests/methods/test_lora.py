"""LoRA: y = W x + s B A x, checked against dense arithmetic."""

import math

import pytest
import torch

import zoo
from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.methods import L2ToInit, LiNeS, LoRA, WiSEFT
from holdfast.methods.adapt._adapter import unfit
from holdfast.plan import Host, Plan
from holdfast.services import Context


def shifted(session):
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return session


def layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


def change(module):
    """W' - W = s B A in plain arithmetic."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return module.scaling["default"] * (b @ a)


def test_hand_value():
    # r = 1, alpha = 3: s = 3.  W = 2, A = (1, 2), B = (1, 0)^T, x = (1, 1), W = I:
    # y = x + 3 * B (A x) = (1, 1) + 3 * (3, 0) = (10, 1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model.config = None
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    from peft import LoraConfig, get_peft_model

    chosen = LoRA(r=1, lora_alpha=3)
    wrapped = get_peft_model(model, LoraConfig(r=chosen.r, lora_alpha=chosen.lora_alpha, target_modules=["0"]))
    with torch.no_grad():
        wrapped.base_model.model[0].lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0]]))
        wrapped.base_model.model[0].lora_B["default"].weight.copy_(torch.tensor([[1.0], [0.0]]))
    assert wrapped(torch.ones(1, 2)).tolist() == [[10.0, 1.0]]


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),  # alpha / r
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),  # alpha / sqrt(r) = 8 / 2
        ({"r": 4, "lora_alpha": 0.5}, 0.125),  # a fraction is not cut to 0
    ],
)
def test_scale(tiny_model, start, settings, scale):
    found = {m.scaling["default"] for m in layers(start([LoRA(**settings)], tiny_model()).model).values()}
    assert found == {scale}


@pytest.mark.parametrize(("dora", "within"), [(False, 0.0), (True, 1e-5)])
def test_the_start_is_the_base(tiny_model, start, token_rows, dora, within):
    base = forward(tiny_model(), token_rows)[1]
    tuned = forward(start([LoRA(r=2, use_dora=dora)], tiny_model()).model, token_rows)[1]
    assert (tuned - base).abs().max().item() <= within


def test_base_untouched_and_one_switch_away(tiny_model, start, token_rows):
    base_model = tiny_model()
    base = forward(base_model, token_rows)[1]
    session = shifted(start([LoRA(r=2)], tiny_model()))
    assert (forward(session.model, token_rows)[1] - base).abs().max() > 1e-3
    with session.model.disable_adapter():
        assert torch.equal(forward(session.model, token_rows)[1], base)
    assert all(".lora_" in n for n in session.params)


def test_rank_of_the_change(tiny_model, start):
    for module in layers(shifted(start([LoRA(r=2)], tiny_model())).model).values():
        values = torch.linalg.svdvals(change(module))
        assert values[2] < 1e-5 * values[0]
        assert values[1] > 1e-3 * values[0]


def test_every_linear_layer_but_the_head(tiny_model, start):
    names = layers(start([LoRA(r=2)], tiny_model(tied=False)).model)
    assert len(names) == 2 * 7
    assert not any("lm_head" in n for n in names)


def test_merging_is_dense_addition(tiny_model, start, token_rows):
    session = shifted(start([LoRA(r=2, lora_alpha=2)], tiny_model()))
    dense = tiny_model()
    with torch.no_grad():
        for name, module in layers(session.model).items():
            dense.get_submodule(name.removeprefix("base_model.model.")).weight += change(module)
        expected = forward(dense, token_rows)[1]
        got = forward(session.model, token_rows)[1]
        merged = forward(session.model.merge_and_unload(), token_rows)[1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_walking_back_by_scaling_b_is_dense_interpolation(tiny_model, start, token_rows, alpha):
    session = shifted(start([LoRA(r=2, lora_alpha=2), WiSEFT(alpha=alpha)], tiny_model()))
    dense = tiny_model()
    with torch.no_grad():
        for name, module in layers(session.model).items():
            weight = dense.get_submodule(name.removeprefix("base_model.model.")).weight
            weight.copy_((1 - alpha) * weight + alpha * (weight + change(module)))
        session.merge()
        expected, got = forward(dense, token_rows)[1], forward(session.model, token_rows)[1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_walking_back_reaches_adapters_of_embeddings_too(tiny_model, start, token_rows):
    session = start([LoRA(r=2, target_modules=("embed_tokens", "lm_head")), WiSEFT(alpha=0.0)], tiny_model())
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.1)
        base = forward(tiny_model(), token_rows)[1]
        assert not torch.allclose(forward(session.model, token_rows)[1], base, atol=1e-2)
        session.merge()
        assert torch.equal(forward(session.model, token_rows)[1], base)


def test_a_base_that_no_folder_holds_is_refused(tiny_model, start, tmp_path):
    """`models.load(adapter, merge_adapter=True)` is called by the adapter's folder; with_plan would save that name."""
    model = tiny_model()
    (tmp_path / "adapter_config.json").write_text("{}")
    model.name_or_path = str(tmp_path)
    with pytest.raises(PlanError, match="plain PEFT would leave that one out"):
        start([LoRA(r=2)], model)


def test_scaling_by_layer_on_the_adapter(tiny_model, start):
    """LiNeS 0.25 on 3 blocks: factors 0.25, 0.25 + 0.75/2 = 0.625, 1."""
    session = shifted(start([LoRA(r=2), LiNeS(alpha=0.25)], tiny_model(layers=3)))
    before = {n: change(m).detach().clone() for n, m in layers(session.model).items()}
    session.merge()
    for name, module in layers(session.model).items():
        factor = {"0": 0.25, "1": 0.625, "2": 1.0}[name.split("layers.")[1][0]]
        torch.testing.assert_close(change(module), factor * before[name])


def test_start_does_not_depend_on_what_ran_before(tiny_model, start):
    one = start([LoRA(r=2)], tiny_model()).params
    torch.rand(17)
    two = start([LoRA(r=2)], tiny_model()).params
    other = start([LoRA(r=2)], tiny_model(), seed=1).params
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_start_of_a_is_kaiming_uniform(tiny_model, start):
    """Uniform(-b, b) with b = sqrt(6 / ((1 + 5) n)) = 1 / sqrt(n); n = 32 inputs."""
    module = next(iter(layers(start([LoRA(r=16)], tiny_model()).model).values()))
    a = module.lora_A["default"].weight
    assert a.shape == (16, 32)
    assert 0.9 / math.sqrt(32) < a.abs().max().item() <= 1 / math.sqrt(32)
    assert not module.lora_B["default"].weight.any()


def test_what_cannot_work(tiny_model, tokenizer):
    ctx = Context(tiny_model(), tokenizer)
    with pytest.raises(PlanError, match=r"LoRA\.r is 0"):
        LoRA(r=0).check(ctx)
    with pytest.raises(PlanError, match="finds nothing to adapt"):
        LoRA(target_modules=("nothing_here",)).adapt(ctx.model, ctx, {})


@pytest.mark.parametrize("other", [WiSEFT(), LiNeS(), L2ToInit()])
def test_dora_is_not_scaled_by_b(other, tiny_model, tokenizer):
    """Scaling B leaves DoRA's trained row lengths in place: alpha 0 would not be the base."""
    ctx = Context(tiny_model(), tokenizer)
    with pytest.raises(PlanError, match=f"LoRA and {other.name}"):
        Plan([LoRA(use_dora=True), other]).check(Host("plain"), ctx)
    Plan([LoRA(), other]).check(Host("plain"), ctx)


APART = {  # what nothing can stand beside, and what is left to adapt
    "llama4_text": ("router", "q_proj"),
    "deepseek_v4": ("o_a_proj", "o_b_proj"),
    "mamba": ("out_proj", "in_proj"),
    "bamba": ("out_proj", "in_proj"),
    "jamba": ("dt_proj", "out_proj"),
    "longcat_flash": ("classifier", "o_proj"),
}


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any:RuntimeWarning")  # PEFT, of experts
@pytest.mark.parametrize("kind", APART)
def test_maps_that_no_adapter_can_stand_beside(kind):
    """Routers that return tuples, grouped maps, weights that a layer reads itself: left out, or refused by name."""
    out, kept = APART[kind]
    model = zoo.build(kind)
    ctx = Context(model, None, 0, ())
    for chosen in ((out, kept), rf".*\.{out}"):
        with pytest.raises(PlanError, match=rf"takes \S*\.{out}, but") as caught:
            LoRA(target_modules=chosen).check(ctx)
        assert kept in caught.value.cure and f" {out}," not in caught.value.cure
    LoRA(target_modules=(kept,)).check(ctx)
    wrapped = LoRA(r=2).adapt(model, ctx, {})
    names = {n.rsplit(".", 1)[-1] for n in layers(wrapped)}
    assert kept in names and out not in names
    wrapped(torch.arange(3, 40)[None]).logits.sum().backward()
    assert all(m.lora_B["default"].weight.grad is not None for n, m in layers(wrapped).items() if n.endswith(kept))


def test_a_map_with_a_forward_of_its_own_that_multiplies_is_adapted():
    assert unfit(zoo.build("falcon")) == {} == unfit(zoo.build("bloom"))
