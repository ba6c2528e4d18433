"""A base in 4 bits: what is refused, in one sentence and before long work, and that packed weights are left alone.

No GPU is needed. Where bitsandbytes is installed (it also computes on a CPU, slowly), a tiny model is really tuned.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import holdfast.methods as hf
from holdfast import models
from holdfast.data.mix import Mix
from holdfast.engine.pack import token_row
from holdfast.errors import ModelError, PlanError, RecipeError
from holdfast.hosts.plain import Training, train
from holdfast.models import loading
from holdfast.plan import Host, Plan
from holdfast.recipe import recipe_from
from holdfast.runs.job import checked
from holdfast.runs.run import Run
from holdfast.services import Context
from holdfast.session import Session, is_plain
from holdfast.verbs.tune import tune
from tiny_run import make_world, recipe_data

FOUR = Host("holdfast tune", quantised=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tokenizer, rows):
    return make_world(tmp_path_factory.mktemp("world"), tiny_model(), tokenizer, rows)


def run_of(world, out, **changes):
    return Run(recipe_from(recipe_data(world, out, **changes)), world.folder)


@pytest.mark.parametrize(
    "plan, named",
    [
        ([], "A plan without an adapter"),
        ([hf.ICLAnchor()], "A plan without an adapter"),
        ([hf.HalfFineTune()], "HalfFineTune"),
        ([hf.OrthogonalSubspace()], "OrthogonalSubspace"),
        ([hf.ICLAnchor(), hf.WiSEFT()], "WiSEFT"),
        ([hf.LiNeS()], "LiNeS"),
        ([hf.L2ToInit()], "L2ToInit"),
        ([hf.ProMoT()], "A plan without an adapter"),
    ],
    ids=lambda x: "+".join(m.name for m in x) or "nothing" if isinstance(x, list) else "",
)
def test_a_plan_that_trains_the_weights_themselves_is_refused(plan, named):
    with pytest.raises(PlanError) as found:
        Plan(plan).check_host(FOUR)
    assert found.value.what.startswith(named) and "loaded in 4 or 8 bits" in found.value.what
    assert "LoRA" in found.value.cure


def test_an_adapter_may_carry_everything_else():
    Plan([hf.LoRA(), hf.ICLAnchor(), hf.L2ToInit(), hf.WiSEFT(), hf.ProMoT()]).check_host(FOUR)
    Plan([hf.WiSEFT()]).check_host(Host("holdfast tune"))


def test_the_plan_is_refused_before_the_model_is_looked_for(world, tmp_path):
    run = run_of(world, tmp_path, model={"load_in_4bit": True, "model_name_or_path": "nowhere"}, plan=["L2ToInit"])
    with pytest.raises(PlanError, match="L2ToInit trains the model's own weights"):
        checked(run)


def test_a_merged_export_is_refused(world, tmp_path):
    run = run_of(world, tmp_path, model={"load_in_4bit": True}, export={"merge": True})
    with pytest.raises(RecipeError, match=r"export.merge is true, but model.load_in_4bit"):
        checked(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could do it")
def test_without_cuda_it_is_refused(world, tmp_path):
    for attempt in (
        lambda: models.load(str(world.base), load_in_4bit=True),
        lambda: checked(run_of(world, tmp_path, model={"load_in_4bit": True})),
    ):
        with pytest.raises(ModelError, match="load_in_4bit needs a CUDA device") as found:
            attempt()
        assert "NVIDIA" in found.value.cure


def test_without_bitsandbytes_it_is_refused():
    from transformers.utils.import_utils import is_bitsandbytes_available

    if is_bitsandbytes_available():
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ModelError, match="needs bitsandbytes") as found:
        models.may_load_in_4bit("cuda")
    assert "pip install" in found.value.cure


def test_packed_weights_are_neither_cast_nor_trained(tiny_model, tokenizer):
    """Weights of few bits may stand under a floating dtype (FSDP wants that); a cast would destroy them."""
    model = tiny_model().to(torch.bfloat16)
    packed = model.model.layers[0].mlp.up_proj.weight
    packed.quant_state = object()
    assert not is_plain(packed) and is_plain(model.lm_head.weight)
    session = Session(Plan(), model, Context(model, tokenizer), compute_dtype=torch.bfloat16)
    session.prepare()
    session.enter(session.stages[0])
    assert packed.dtype == torch.bfloat16 and not packed.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.float32


def test_beside_an_adapter_the_base_is_not_copied(tiny_model, tokenizer):
    model = tiny_model()
    session = Session(Plan([hf.LoRA(r=2), hf.L2ToInit(), hf.WiSEFT()]), model, Context(model, tokenizer))
    session.prepare()
    assert not session.base_weights
    session = Session(Plan([hf.WiSEFT()]), model, Context(model, tokenizer))
    session.prepare()
    assert len(session.base_weights) == len(list(model.named_parameters()))


@pytest.mark.filterwarnings("default")  # what bitsandbytes says of a CPU is not ours
def test_a_tiny_model_in_4_bits_is_tuned(world, tokenizer, monkeypatch):
    """On a CPU, past the refusal: the same weights, options and session as on a GPU."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # its packing for CPUs wants one more package
    place = torch.device("cpu")
    options = models.four_bits(torch.bfloat16, place)
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.bfloat16, local_files_only=True, **options)
    assert models.precision(model) == "nf4, bfloat16"
    plan = Plan([hf.LoRA(r=4), hf.ICLAnchor(pool=2, every=1), hf.WiSEFT(alpha=0.9)])
    ctx = Context(model, tokenizer, total_steps=6)
    plan.check(FOUR, ctx)
    session = Session(plan, model, ctx, compute_dtype=torch.bfloat16, knows_rows=True)
    rows = [token_row(tokenizer.encode("Ticket: the box is open\nQueue: shipping"), 4)]
    session.prepare(rows)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = Training(6, 1, learning_rate=1e-2, autocast=torch.bfloat16, save_steps=0)
    log = train(session, Mix(rows), settings)
    assert log.loss[0][1]["ICLAnchor"] >= 0 and log.loss[-1][1]["task"] < log.loss[0][1]["task"]
    after = dict(session.model.get_base_model().named_parameters())
    quantised = [n for n, p in before.items() if p.dtype == torch.uint8]
    assert quantised and all(
        torch.equal(before[n], after[n.replace(".weight", ".base_layer.weight")]) for n in quantised
    )
    session.merge()
    session.finish()
    assert models.precision(session.finished_model(torch.bfloat16)[0]) == "nf4, bfloat16"


@pytest.mark.filterwarnings("default")
def test_a_run_in_4_bits_from_recipe_to_report(world, tmp_path, monkeypatch):
    """The default plan by `tune`, and the export measured again as anybody would load it, past the refusal of CPUs."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(loading, "may_load_in_4bit", lambda *_: None)
    monkeypatch.setattr(models, "may_load_in_4bit", lambda *_: None)
    model = {"load_in_4bit": True, "dtype": "bfloat16"}
    plan = [{"LoRA": {"r": 4}}, {"ICLAnchor": {"pool": 4, "every": 1}}]
    folder = tune(recipe_from(recipe_data(world, tmp_path / "run", model=model, plan=plan)))
    report = json.loads((folder / "report.json").read_text())
    losses = [loss for _, loss in json.loads((folder / "training.json").read_text())["loss"]]
    assert losses[-1] < losses[0] - 0.2
    assert report["task"]["after"]["n"] == 6
    tuned, _ = models.load(str(folder / "model"), load_in_4bit=True, dtype="bfloat16")
    assert models.precision(tuned) == "nf4, bfloat16" and hasattr(tuned, "peft_config")


# ---- what methods ask of packed weights


def packed_maps(model):
    """The maps of the blocks with weights as 4 bits hold them: a column of bytes, whose shape says nothing."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            shape = (module.weight.numel() // 2, 1)
            module.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    return model


def test_methods_read_the_width_of_packed_maps(tiny_model, tokenizer, tmp_path):
    ctx = Context(packed_maps(tiny_model()), tokenizer)
    hf.EVA(r=4).check(ctx)
    with pytest.raises(PlanError, match=r"principal decomposes plain weights, but .* has few bits"):
        hf.OrthogonalLoRA(principal=2).check(ctx)
    a = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    save_file(a, tmp_path / "adapter_model.safetensors")
    hf.OrthogonalLoRA(earlier=(str(tmp_path),)).check(ctx)


@pytest.mark.parametrize("method", [hf.PromptTuning(), hf.PrefixTuning(), hf.PhrasingPrompt()])
def test_a_soft_prompt_trains_no_packed_weight(tiny_model, tokenizer, method):
    Plan([method]).check(FOUR, Context(tiny_model(), tokenizer))
