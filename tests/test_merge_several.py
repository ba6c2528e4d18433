"""Merging a tuned model with others: a whole model and an adapter on the disk, read one tensor at a time."""

import copy
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from holdfast import methods as hf
from holdfast import models
from holdfast.errors import ModelError, PlanError, RecipeError
from holdfast.models.related import check_related
from holdfast.models.tensors import Adapted, Saved, tensors_of
from holdfast.plan import Host, Plan
from holdfast.recipe import load_recipe
from holdfast.services import Context
from holdfast.sites.merging import Merging
from holdfast.verbs.tune import tune
from tiny import build_model
from tiny_run import make_world, recipe_data, write_recipe

STEPS = {"training": {"max_steps": 4, "learning_rate": 0.003}}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tokenizer, rows):
    """Paths of a base, of a model tuned from it (`full`) and of an adapter tuned on it (`adapter`)."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        found = make_world(folder, tiny_model(), tokenizer, rows)
        for name, plan in (("full", [{"Freeze": {"layers": 1}}]), ("adapter", [{"LoRA": {"r": 4}}])):
            tune(recipe(found, folder / name, plan))
            setattr(found, name, folder / name / "model")
        yield found


def recipe(world, out: Path, plan, **changes):
    data = recipe_data(world, out, plan=plan, **{**STEPS, **changes})
    return load_recipe(write_recipe(out.parent / f"{out.name}.yaml", data))


def ties(*names, **settings):
    return [{"TIES": {"models": [str(n) for n in names], **settings}}]


def loaded(path) -> torch.nn.Module:
    return models.load(str(path), dtype="float32", merge_adapter=True)[0]


def tensors(path):
    return {n: p.detach() for n, p in loaded(path).named_parameters()}


def exported(run: Path):
    return load_file(run / "model" / "model.safetensors")


# ---- a run


def elected(base, tuned, density):
    """TIES written down plainly, all numbers of a model in one row."""
    taus = torch.stack([torch.cat([(t[n] - w).flatten() for n, w in base.items()]) for t in tuned])
    least = taus.abs().topk(int(density * taus.shape[1])).values[:, -1:]
    taus = torch.where(taus.abs() >= least, taus, 0)
    agree = (taus.sign() == torch.where(taus.sum(0) >= 0, 1, -1)) & (taus != 0)
    return (taus * agree).sum(0) / agree.sum(0).clamp(min=1)


def test_a_run_merges_what_it_tuned_with_a_model_and_an_adapter(world, tmp_path):
    tune(recipe(world, tmp_path / "alone", []))
    tune(recipe(world, tmp_path / "merged", ties(world.full, world.adapter, density=0.3)))
    base = tensors(world.base)
    parts = [tensors(p) for p in (tmp_path / "alone" / "model", world.full, world.adapter)]
    got = torch.cat([(exported(tmp_path / "merged")[n] - w).flatten() for n, w in base.items()])
    wanted = elected(base, parts, 0.3)
    differs = (got - wanted).abs() > 1e-6
    assert differs.float().mean() < 1e-3  # those within a bin of the threshold
    alone = torch.cat([(parts[0][n] - w).flatten() for n, w in base.items()])
    assert (got - alone).norm() > 0.1 * alone.norm()
    began = json.loads((tmp_path / "merged" / "inputs.json").read_text())
    assert began["TIES model other 1"] == models.resolve(str(world.adapter)).sha


def test_a_relative_path_starts_beside_the_recipe(world, tmp_path):
    shutil.copytree(world.full, tmp_path / "beside")
    tune(write_recipe(tmp_path / "r.yaml", recipe_data(world, tmp_path / "a", plan=ties("beside"), **STEPS)))
    tune(recipe(world, tmp_path / "b", ties(world.full)))
    one, other = exported(tmp_path / "a"), exported(tmp_path / "b")
    assert all(torch.equal(one[n], t) for n, t in other.items())


def killed_before_merging(world, out, monkeypatch, plan):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Merging, "merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        tune(recipe(world, out, plan))
    assert (out / "checkpoint").is_dir() and not (out / "model").exists()


def test_a_run_killed_between_training_and_merging_goes_on(world, tmp_path, monkeypatch):
    plan = ties(world.full, world.adapter)
    killed_before_merging(world, tmp_path / "killed", monkeypatch, plan)
    tune(recipe(world, tmp_path / "killed", plan))
    tune(recipe(world, tmp_path / "whole", plan))
    one, other = exported(tmp_path / "killed"), exported(tmp_path / "whole")
    assert all(torch.equal(one[n], t) for n, t in other.items())


def test_another_model_that_changed_in_the_meantime_ends_the_run(world, tmp_path, monkeypatch):
    folder = tmp_path / "other"
    shutil.copytree(world.full, folder)
    killed_before_merging(world, tmp_path / "run", monkeypatch, ties(folder))
    spoil(folder, lambda name, t: t * 1.01)
    with pytest.raises(RecipeError, match="TIES model other 0 of this recipe is no longer"):
        tune(recipe(world, tmp_path / "run", ties(folder)))


def spoil(folder: Path, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({n: change(n, t).contiguous() for n, t in state.items()}, file, metadata={"format": "pt"})


# ---- one tensor at a time


def test_no_second_model_is_ever_in_memory(world, tiny_model, monkeypatch):
    """No more of the tensors that were read are alive at a time than there are other models."""
    seen, most = [], [0]

    def note(kind, plain):
        def read(self, name, base, part=None):
            found = plain(self, name, base)
            seen.append(weakref.ref(found))
            most[0] = max(most[0], len({id(t) for r in seen if (t := r()) is not None} - own))
            return found

        monkeypatch.setattr(kind, "read", read)

    model, names = loaded(world.base), [str(world.full), str(world.adapter), str(world.full)]
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = {id(w) for w in base.values()}  # an adapter gives back what it does not change
    note(Saved, Saved.read)
    note(Adapted, Adapted.read)
    merging = Merging([hf.TIES(models=tuple(names))], {"TIES": {}}, None, 2)
    merging.open(model)
    assert not seen
    merging.merge(model, base)
    assert len(seen) == 2 * len(names) * len(base)  # a survey and the merging
    assert most[0] <= len(names)


def test_a_survey_sees_what_the_methods_before_will_have_made(world):
    """LiNeS shrinks lower layers, so another ranking over the whole model keeps other changes."""
    lines, trim = hf.LiNeS(alpha=0.1), hf.TIES(density=0.2)
    base = tensors(world.base)

    def after(*steps):
        model = loaded(world.full)
        for methods in steps:
            Merging(methods, {m.name: {} for m in methods}, None, 2).merge(model, base)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    chained, in_turn, alone = after([lines, trim]), after([lines], [trim]), after([trim], [lines])
    assert all(torch.equal(chained[n], w) for n, w in in_turn.items())
    assert any(not torch.equal(chained[n], w) for n, w in alone.items())


def test_shards_are_read_by_their_index(world, tmp_path):
    model = loaded(world.full)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "consolidated.safetensors")  # in no index
    saved = tensors_of(models.resolve(str(tmp_path)), model)
    for name, p in model.named_parameters():
        assert torch.equal(saved.read(name, p), p)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_found_under_its_name(tied, tiny_model, tokenizer, tmp_path):
    model = tiny_model(tied)
    models.save_model(model, tokenizer, tmp_path / "m", card=None)
    saved = tensors_of(models.resolve(str(tmp_path / "m")), model)
    for name, p in model.named_parameters():
        assert torch.equal(saved.read(name, p), p)


def test_names_without_the_head_of_the_model(tmp_path, tokenizer):
    """Old GPT-2 files call transformer.h.0 just h.0."""
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    plain = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(plain, file, metadata={"format": "pt"})
    saved = tensors_of(models.resolve(str(tmp_path)), model)
    assert all(torch.equal(saved.read(n, p), p) for n, p in model.named_parameters())


# ---- adapters

KINDS = {
    "lora": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    "rslora": LoraConfig(r=3, use_rslora=True, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=["v_proj"], init_lora_weights=False),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": LoHaConfig(r=2, target_modules=["o_proj"], init_weights=False),
}


def adapter(world, folder, config, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=dtype)
    with models.peft_quiet():
        get_peft_model(model, copy.deepcopy(config)).save_pretrained(folder)
    return models.resolve(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_its_base_plus_pefts_change(kind, world, tmp_path):
    source, base = adapter(world, tmp_path, KINDS[kind]), loaded(world.base)
    check_related(source, base)
    read, wanted, changed = tensors_of(source, base), loaded(tmp_path), 0
    for _ in range(2):  # nothing stays merged
        for name, p in base.named_parameters():
            assert torch.equal(read.read(name, p.detach()), wanted.get_parameter(name)), name
            changed += not torch.equal(p, wanted.get_parameter(name))
    assert changed >= 2 * 2


def test_an_adapter_that_brings_whole_modules_is_refused(world, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ModelError, match=r"cannot be read as its base plus a change: it brings .*norm"):
        check_related(adapter(world, tmp_path, config), loaded(world.base))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_a_tied_weight_is_refused(target, world, tmp_path):
    config = LoraConfig(r=2, target_modules=[target])
    with pytest.raises(ModelError, match=f"it changes .*{target}, which the base ties to another module"):
        check_related(adapter(world, tmp_path, config), loaded(world.base))


def test_an_adapter_on_another_base_is_refused(world, tmp_path, tokenizer):
    tuned = world.full  # of the same shape, so only the weights tell
    get_peft_model(AutoModelForCausalLM.from_pretrained(tuned), copy.deepcopy(KINDS["lora"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an adapter on .*, whose model\..* is not the base's"):
        check_related(models.resolve(str(tmp_path)), loaded(world.base))


def test_precision_makes_no_other_base(world, tmp_path):
    source = adapter(world, tmp_path, KINDS["lora"])
    check_related(source, models.load(str(world.base), dtype="bfloat16")[0])


# ---- refusals before any training


def other(folder, tokenizer, **changes):
    models.save_model(build_model(**changes), tokenizer, folder, card=None)
    return models.resolve(str(folder))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 1}, r"does not descend from the base: its weights correlate with the base's by -?0\.0"),
        ({"tied": False}, "does not tie its embeddings, and the base does"),
        ({"layers": 1}, r"has no tensor model\.layers\.1\."),
        ({"intermediate_size": 48}, r"of shape \(48, 32\), and the base of shape \(64, 32\)"),
        ({"vocab_size": 408}, r"embed_tokens\.weight of shape \(408, 32\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_no_relative_is_refused(changes, match, tmp_path, tiny_model, tokenizer):
    with pytest.raises(ModelError, match=match):
        check_related(other(tmp_path / "m", tokenizer, **changes), tiny_model(), tokenizer)


def test_another_architecture_is_refused(tmp_path, tiny_model, tokenizer):
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    models.save_model(GPT2LMHeadModel(config), tokenizer, tmp_path / "m", card=None)
    with pytest.raises(ModelError, match="is of architecture gpt2, and the base of llama"):
        check_related(models.resolve(str(tmp_path / "m")), tiny_model())


def test_another_vocabulary_is_refused(tmp_path, tiny_model, tokenizer):
    source = other(tmp_path / "m", tokenizer)
    text = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ModelError, match=r"has another vocabulary than the base: .* is token 30\d there, 30\d here"):
        check_related(source, tiny_model(), tokenizer)


def test_packed_weights_are_refused(tmp_path, tiny_model, tokenizer):
    source = other(tmp_path / "m", tokenizer)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised with gptq, and packed weights cannot be merged"):
        check_related(source, tiny_model())


def test_weights_that_are_not_finite_are_refused(world, tmp_path):
    shutil.copytree(world.full, tmp_path / "m")
    spoil(tmp_path / "m", lambda n, t: t * float("nan") if "q_proj" in n else t)
    with pytest.raises(ModelError, match="holds weights that are no finite numbers"):
        check_related(models.resolve(str(tmp_path / "m")), loaded(world.base))


def test_the_method_and_the_model_are_named_before_anything_is_trained(world, tmp_path):
    with pytest.raises(ModelError, match="TIES cannot merge another model: No model 'no/such'"):
        tune(recipe(world, tmp_path / "run", ties("no/such")))
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_an_adapter_of_the_run_cannot_be_merged_with_other_models(world, tiny_model, tokenizer):
    plan = Plan([hf.LoRA(r=2), hf.TIES(models=(str(world.full),))])
    with pytest.raises(PlanError, match="TIES works on the model's own weights, but LoRA freezes them"):
        plan.check(Host("test"), Context(tiny_model(), tokenizer))
