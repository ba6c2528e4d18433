"""The site `replace`: an off-switch that is exact whatever way a model runs, what is handed out, and its folders."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import holdfast
import zoo
from cases import run, weights_of
from holdfast import methods as hf
from holdfast import models, with_plan
from holdfast.engine import trial
from holdfast.engine.forward import forward, forward_states
from holdfast.engine.pack import pack
from holdfast.engine.replaced import Replaced, hand_out, own_tensors, replaced_in, switched_off
from holdfast.engine.ways import run_one_by_one, run_packed, run_padded
from holdfast.errors import ModelError, NoEffect, PlanError, RecipeError
from holdfast.measure.scorer import Scorer
from holdfast.method import Method, Term
from holdfast.plan import Host, Plan
from holdfast.recipe import load_recipe
from holdfast.runs.run import Run
from holdfast.services import Context
from holdfast.session import Session
from holdfast.sites import replace
from holdfast.verbs.check import check
from holdfast.verbs.tune import go, tune
from tiny_run import recipe_data, write_recipe

PAIRS = hf.ControlLLM(every=2, weight=5.0)


class Scaled(Replaced):
    """y -> factor * y for each channel of what a linear map gives; hands out what it was given."""

    def __init__(self, original: nn.Module):
        super().__init__(original)
        self.factor = nn.Parameter(torch.ones(original.out_features))

    def changed(self, x):
        hand_out("inputs", x)
        return self.base_layer(x) * self.factor


@dataclass(frozen=True, kw_only=True)
class Scale(Method):
    """Scaling channels (as SSF does), with a penalty on its inputs: a replaced module inside of a layer."""

    weight: float = 0.1
    target: str = "up_proj"

    wraps: ClassVar = True

    def replace(self, name, module, ctx, state):
        return Scaled(module) if name.endswith(self.target) else None

    def merged(self, name, module):
        plain = nn.Linear(module.base_layer.in_features, module.base_layer.out_features, bias=False)
        plain.weight = nn.Parameter(module.base_layer.weight.detach() * module.factor.detach()[:, None])
        return plain

    def loss(self, view):
        each = view.inside("inputs", "task")
        return Term(self.weight * torch.stack(each).square().mean((0, 2)), "task")


@dataclass(frozen=True, kw_only=True)
class Silent(Method):
    """Without a term."""

    wraps: ClassVar = True

    def replace(self, name, module, ctx, state):
        return Scale().replace(name, module, ctx, state)


@pytest.fixture(scope="module")
def tuned(tiny_model, tokenizer, rows):
    """A model whose copies went far from their layers."""
    return run([PAIRS], tiny_model(layers=4), tokenizer, rows, 8, learning_rate=0.01).model


@pytest.fixture(scope="module")
def texts(rows, tokenizer):
    from holdfast.data.tokens import tokenize

    return [tokenize(r, tokenizer, 512) for r in rows[:4]]


def prompts(count, width):
    return torch.arange(7, 7 + count * width).view(count, width)


# ---- the switch


WAYS = {"packed": run_packed, "padded": run_padded, "one by one": run_one_by_one}


@pytest.mark.parametrize("way", WAYS)
def test_off_is_the_base_to_the_last_bit(way, tuned, tiny_model, texts):
    packed, none = pack(texts), [0] * len(texts)
    go_on = lambda m: WAYS[way](m.eval(), packed, none, None, ())[0]  # noqa: E731
    with torch.no_grad():
        base = go_on(tiny_model(layers=4))
        assert (go_on(tuned) - base).abs().max() > 0.01
        with switched_off(tuned):
            assert torch.equal(go_on(tuned), base)
        assert not torch.equal(go_on(tuned), base)


def test_off_generates_as_the_base(tuned, tiny_model):
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": prompts(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    base = tiny_model(layers=4).eval()
    with switched_off(tuned):
        off = tuned.generate(**given, **settings, output_logits=True, return_dict_in_generate=True)
    plain = base.generate(**given, **settings, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(off.sequences, plain.sequences)
    for a, b in zip(off.logits, plain.logits, strict=True):  # one row of a product rounds by where it lies in memory
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_switch_is_set_back_after_an_error(tuned):
    with pytest.raises(KeyError), switched_off(tuned):
        raise KeyError
    assert not any(m.off for m in replaced_in(tuned).values())


@pytest.mark.parametrize("known", [True, False])
def test_the_teacher_is_the_base(known, tiny_model, tokenizer, rows, texts):
    """Known rows from its memory, others by the switch: no copy of the base is made."""
    model = tiny_model(tied=False)
    ctx = Context(model, tokenizer, 0, rows, max_length=512, total_steps=4)
    session = Session(Plan([PAIRS, hf.KLToBase()]), model, ctx, knows_rows=known)
    base = forward(model, texts)[1].log_softmax(-1)
    session.prepare(texts if known else ())
    session.enter(session.stages[0])
    with torch.no_grad():
        for p in session.params.values():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(session.teacher.logp(session.model, texts), base, rtol=0, atol=1e-5)
    assert (forward(session.model, texts)[1].log_softmax(-1) - base).abs().max() > 0.01
    assert session.teacher._copy is None


# ---- the cache of keys and values


def with_cache_and_without(model, **how):
    given = {"input_ids": prompts(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    given["attention_mask"][0, :3] = 0  # the first prompt is padded on the left
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **how}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    return [model.generate(**given, **settings, use_cache=use) for use in (True, False)]


@pytest.mark.parametrize("beams", [1, 3])
def test_text_is_the_same_with_a_cache(beams, tuned):
    """With beams the cache is reordered at every token, the copies' layers too."""
    cached, plain = with_cache_and_without(tuned, num_beams=beams)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_prompts_are_continued_together(tuned):
    """The trial of two new tokens after a prompt, in which a copy that shares its layer's cache would fail."""
    assert trial.continues(tuned, 0, True) and trial.continues(tuned, 0, False)


def test_a_copy_in_the_cache_of_its_layer_is_seen(tiny_model, tokenizer, rows):
    model = run([PAIRS], tiny_model(layers=4), tokenizer, rows, 2).model
    for module in replaced_in(model).values():
        module.expanded.self_attn.layer_idx = module.layer
    assert not trial.continues(model, 0, True)


@pytest.mark.parametrize("prompt", [0, 3])
def test_scores_do_not_depend_on_how_the_tree_is_cut(prompt, tuned, tokenizer, rows):
    """Parts of a tree that do not fit go on from a cache; a soft prompt stands in one before all of them."""
    soft = 0.1 * torch.randn(prompt, tuned.config.hidden_size) if prompt else None
    requests = [(r.prompt, r.completion) for r in rows[:6]]
    one, many = (Scorer(tuned, tokenizer, batch_tokens=n, soft_prompt=soft).score(requests) for n in (4096, 8))
    logprobs = torch.tensor([s.logprob for s in one])
    torch.testing.assert_close(torch.tensor([s.logprob for s in many]), logprobs, rtol=0, atol=1e-4)
    with switched_off(tuned):
        off = Scorer(tuned, tokenizer, soft_prompt=soft).score(requests)
    assert not torch.allclose(torch.tensor([s.logprob for s in off]), logprobs, atol=1e-2)


def test_a_cache_begun_without_the_copies_is_refused(tuned):
    with switched_off(tuned):
        begun = tuned(prompts(1, 5), use_cache=True)
    with pytest.raises(RuntimeError, match="switched off"):
        tuned(prompts(1, 1), cache=begun.cache)


@pytest.mark.parametrize(
    "kind", ["qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt_neox", "olmo2", "mixtral", "gpt2"]
)
def test_other_architectures(kind, tokenizer, texts):
    """Windows, caps, learned norms, layers that read `attention_type`: step 0 is the base, text needs its cache."""
    model = zoo.build(kind).eval()
    base, before = forward(model, texts)[1], weights_of(model)
    session = Session(Plan([PAIRS]), model, Context(model, tokenizer, 0))
    session.prepare()
    session.enter(session.stages[0])
    torch.testing.assert_close(forward(model.eval(), texts)[1], base, rtol=0, atol=1e-5)
    with torch.no_grad():
        for p in session.params.values():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        with switched_off(model):
            assert torch.equal(forward(model, texts)[1], base)
    cached, plain = with_cache_and_without(model)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert all(torch.equal(weights_of(model)[n], w) for n, w in before.items())


def test_a_layer_of_several_streams_is_refused(tokenizer, texts):
    model = zoo.build("gemma3n_text").eval()
    session = Session(Plan([PAIRS]), model, Context(model, tokenizer, 0))
    session.prepare()
    session.enter(session.stages[0])
    with pytest.raises(ModelError, match="several streams"):
        session.probe(texts[:1])


# ---- what is handed out


@pytest.mark.parametrize("way", WAYS)
def test_what_is_handed_out_lies_in_packed_order(way, tiny_model, tokenizer, texts):
    model = tiny_model()
    method = Scale()
    replace.replace(model, method, Context(model, tokenizer), {})
    handed = WAYS[way](model.eval(), pack(texts), [0] * len(texts), None, ())[2]["inputs"]
    alone = [run_packed(model, pack([r]), [0], None, ())[2]["inputs"] for r in texts]
    assert len(handed) == len(model.model.layers)
    for n, value in enumerate(handed):
        torch.testing.assert_close(value, torch.cat([one[n] for one in alone]), rtol=1e-4, atol=1e-5)


def test_the_base_hands_out_nothing(tuned, texts):
    assert len(forward_states(tuned, texts, ())[3]["divergence"]) == 2
    with switched_off(tuned):
        assert forward_states(tuned, texts, ())[3] == {}


@pytest.mark.parametrize("method", [hf.ControlLLM(every=1, weight=50.0), Scale()], ids=lambda m: m.name)
def test_gradient_checkpointing_counts_once(method, tiny_model, tokenizer, texts):
    """Layers run again in the backward: loss and gradients are those of one forward, and nothing stays on a module."""
    found = []
    for again in (False, True):
        model = tiny_model()
        session = Session(Plan([method]), model, Context(model, tokenizer, 0), packing=False)
        session.prepare()
        session.enter(session.stages[0])
        with torch.no_grad():
            for p in session.params.values():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss, parts = session.loss(model, texts, Counter(task=sum(r.num_scored for r in texts)), 0)
        loss.backward()
        found.append(({n: v.item() for n, v in parts.items()}, {n: p.grad.clone() for n, p in session.params.items()}))
        assert not [v for m in replaced_in(model).values() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    (plain, grads), (parts, others) = found
    assert parts == pytest.approx(plain, rel=1e-5) and parts[method.name] > 0
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-6)


# ---- in a session


def test_only_own_parameters_train(tiny_model, tokenizer, rows):
    result = run([Scale()], tiny_model(), tokenizer, rows, 4)
    base = weights_of(tiny_model())
    assert all(torch.equal(result.weights[n], w) for n, w in base.items())
    assert set(result.weights) - set(base) == {f"model.layers.{n}.mlp.up_proj.factor" for n in (0, 1)}
    assert result.session.effects["Scale"]


def test_nothing_inside_a_replaced_module_is_asked(tiny_model, tokenizer):
    asked = []

    @dataclass(frozen=True, kw_only=True)
    class All(Method):
        wraps: ClassVar = True

        def replace(self, name, module, ctx, state):
            asked.append(name)
            return PAIRS.replace(name, module, ctx, state)

    model = tiny_model()
    assert replace.replace(model, All(), Context(model, tokenizer), {}) == ["model.layers.1"]
    assert "model.layers.0.mlp.up_proj" in asked and not any(n.startswith("model.layers.1.") for n in asked)


def test_a_method_that_replaces_nothing_is_told(tiny_model, tokenizer, rows):
    with pytest.raises(NoEffect, match="Scale replaces no module"):
        run([Scale(target="no_such_layer")], tiny_model(), tokenizer, rows, 2)


def test_a_stage_of_the_prompt_runs_the_base(tiny_model, tokenizer, rows):
    seen = []
    watch = lambda session, step: seen.append([m.off for m in replaced_in(session.model).values()])  # noqa: E731
    result = run(
        [hf.ProMoT(num_virtual_tokens=3), hf.ControlLLM(every=1)], tiny_model(), tokenizer, rows, 6, watch=watch
    )
    assert seen == [[True, True]] * 3 + [[False, False]] * 3
    assert ["ControlLLM" in parts for _, parts in result.log.loss] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("other", [hf.LoRA(), hf.HalfFineTune(), hf.L2ToInit(), hf.WiSEFT(), hf.LiNeS()])
def test_what_works_on_the_models_own_weights_is_refused(other):
    for plan in ([PAIRS, other], [other, PAIRS]):
        with pytest.raises(PlanError, match=rf"(?s)(ControlLLM.*{other.name}|{other.name}.*ControlLLM)"):
            Plan(plan).check_together()


def test_a_quantised_base_is_refused():
    with pytest.raises(PlanError, match="ControlLLM puts modules"):
        Plan([PAIRS]).check_host(Host("holdfast tune", quantised=True))


# ---- merged


def test_what_can_be_folded_in_becomes_a_plain_model(tiny_model, tokenizer, rows, texts, tmp_path):
    model = run([Scale()], tiny_model(), tokenizer, rows, 8, learning_rate=0.01).model
    before = forward(model, texts)[1]
    replace.merge(model, Scale())
    torch.testing.assert_close(forward(model, texts)[1], before, rtol=1e-4, atol=1e-5)
    assert not replaced_in(model)
    folder = models.save_model(model, tokenizer, tmp_path / "merged", card=None)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(forward(plain, texts)[1], forward(model, texts)[1])
    assert not torch.allclose(before, forward(tiny_model(), texts)[1], atol=1e-3)


# ---- folders


@pytest.fixture(scope="module")
def finished(world):
    """A whole run of `holdfast tune` with Control LLM and a teacher."""
    plan = [{"ControlLLM": {"every": 1, "mixture": "dlerp"}}, {"ICLAnchor": {"pool": 4, "every": 1}}]
    return tune(write_recipe(world.folder / "recipe.yaml", recipe_data(world, world.folder / "run", plan=plan)))


@pytest.fixture
def export(finished, tmp_path):
    """A copy of its export that a test may spoil."""
    return shutil.copytree(finished / "model", tmp_path / "model")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_goes_to_its_report(finished):
    report = read(finished / "report.json")
    assert [m["method"] for m in report["plan"]] == ["ControlLLM", "ICLAnchor"]
    assert report["tuned"]["export"].startswith("loaded the way its card says, its logits equal")
    assert set(report["training"]["terms"]) == {"ControlLLM", "ICLAnchor"}
    assert not (finished / "checkpoint").exists()


def test_a_soft_prompt_goes_with_it(world, tmp_path):
    plan = [{"ProMoT": {"num_virtual_tokens": 2}}, {"ControlLLM": {"every": 1}}]
    out = tune(write_recipe(tmp_path / "recipe.yaml", recipe_data(world, tmp_path / "run", plan=plan)))
    assert read(out / "report.json")["tuned"]["export"].startswith("loaded the way its card says")
    assert 'task_model = PeftModel.from_pretrained(model, "../prompt")' in (out / "model" / "README.md").read_text()


def test_the_folder_and_its_card(finished, world):
    names = {p.name for p in (finished / "model").iterdir()}
    assert {"replaced.json", "replaced.safetensors", "README.md", "generation_config.json"} <= names
    assert not [n for n in names if n in ("config.json", "adapter_config.json") or n.startswith("model")]
    said = read(finished / "model" / "replaced.json")
    assert said["method"] == "ControlLLM" and said["settings"]["mixture"] == "dlerp"
    assert said["modules"] == ["model.layers.0", "model.layers.1"]
    assert said["base"] == {"name": str(world.base), "revision": None, "sha": models.fingerprint(str(world.base))}
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert (
        'import holdfast\n\nfolder = "."  # this one\nmodel, tokenizer = holdfast.load(folder, dtype="float32")'
        in card
    )
    assert "library_name: holdfast" in card


def test_plain_transformers_do_not_load_it_as_something_else(finished):
    for kind in (AutoModelForCausalLM, AutoConfig):
        with pytest.raises((OSError, ValueError)):
            kind.from_pretrained(finished / "model")
    assert AutoTokenizer.from_pretrained(finished / "model").encode("a")


def test_loaded_it_is_the_tuned_model_on_its_base(finished, world, texts):
    model, tokenizer = holdfast.load(finished / "model", dtype="float32", device="cpu")
    base, _ = holdfast.load(world.base, dtype="float32", device="cpu")
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert (forward(model, texts)[1] - forward(base, texts)[1]).abs().max() > 1e-3
    with switched_off(model):
        assert torch.equal(forward(model, texts)[1], forward(base, texts)[1])
    assert tokenizer.decode(model.generate(prompts(1, 4), max_new_tokens=3)[0])


def test_saved_again_it_is_the_same(finished, tmp_path, texts):
    model, tokenizer = holdfast.load(str(finished / "model"), dtype="float32", device="cpu")
    folder = models.save_model(model, tokenizer, tmp_path / "again", card=None)
    again, _ = holdfast.load(str(folder), dtype="float32", device="cpu")
    assert torch.equal(forward(again, texts)[1], forward(model, texts)[1])
    assert models.fingerprint(str(folder)) == models.fingerprint(str(finished / "model"))


def test_load_takes_all_that_models_load_takes(world, tokenizer, tmp_path, texts):
    base, _ = models.load(str(world.base), dtype="float32", device="cpu")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    models.save_model(adapted, tokenizer, tmp_path / "adapter", card=None)
    for name, merge in ((world.base, False), (tmp_path / "adapter", False), (tmp_path / "adapter", True)):
        ours, _ = holdfast.load(name, dtype="float32", device="cpu", merge_adapter=merge)
        theirs, _ = models.load(str(name), dtype="float32", device="cpu", merge_adapter=merge)
        assert torch.equal(forward(ours, texts)[1], forward(theirs, texts)[1])


def test_its_identity_is_its_content(export):
    before = models.fingerprint(str(export))
    said = read(export / "replaced.json")
    (export / "replaced.json").write_text(json.dumps(said | {"holdfast": "9.9"}))
    assert models.fingerprint(str(export)) == before
    (export / "replaced.json").write_text(json.dumps(said | {"settings": said["settings"] | {"share": 0.25}}))
    assert models.fingerprint(str(export)) != before


def test_another_base_is_refused(export, world, tmp_path):
    other = shutil.copytree(world.base, tmp_path / "other")
    config = read(other / "config.json")
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    said = read(export / "replaced.json")
    (export / "replaced.json").write_text(json.dumps(said | {"base": said["base"] | {"name": str(other)}}))
    with pytest.raises(ModelError, match="another content"):
        holdfast.load(export)
    (export / "replaced.json").write_text(json.dumps(said | {"base": {"name": ""}}))
    with pytest.raises(ModelError, match="does not name its base"):
        holdfast.load(export)


def test_settings_that_make_other_modules_are_refused(export):
    said = read(export / "replaced.json")
    for wrong, words in (
        ({"settings": said["settings"] | {"every": 2}}, "other modules"),
        ({"settings": said["settings"] | {"mixture": "lerp"}}, "other modules"),
        ({"method": "NoSuchMethod"}, "NoSuchMethod"),
    ):
        (export / "replaced.json").write_text(json.dumps(said | wrong))
        with pytest.raises(ModelError, match=words):
            holdfast.load(export, dtype="float32", device="cpu")


def test_a_damaged_folder_is_refused(export):
    said = read(export / "replaced.json")
    (export / "replaced.json").write_text(json.dumps({k: v for k, v in said.items() if k != "modules"}))
    with pytest.raises(ModelError, match="is damaged"):
        holdfast.load(export, dtype="float32", device="cpu")
    (export / "replaced.json").write_text(json.dumps(said))
    (export / "replaced.safetensors").write_bytes((export / "replaced.safetensors").read_bytes()[:500])
    with pytest.raises(ModelError, match="is damaged"):
        holdfast.load(export, dtype="float32", device="cpu")
    (export / "replaced.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks its weights"):
        holdfast.load(export, dtype="float32", device="cpu")


def test_what_cannot_be_done_with_it_is_refused_in_a_sentence(finished, world, tokenizer, tmp_path, tiny_model):
    folder = str(finished / "model")
    with pytest.raises(ModelError, match=r"holdfast\.load"):
        models.load(folder)
    with pytest.raises(ModelError, match="4 bits"):
        holdfast.load(folder, load_in_4bit=True)
    with pytest.raises(ModelError, match="nothing can be trained further"):
        tune(
            write_recipe(
                tmp_path / "r.yaml", recipe_data(world, tmp_path / "run", model={"model_name_or_path": folder})
            )
        )
    with pytest.raises(ModelError, match="holds the base of this adapter"):
        model, _ = holdfast.load(folder, dtype="float32", device="cpu")
        models.save_model(model, tokenizer, world.base, card=None)
    model, _ = holdfast.load(world.base, dtype="float32", device="cpu")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    models.save_model(adapter, tokenizer, tmp_path / "adapter", card=None)
    config = read(tmp_path / "adapter" / "adapter_config.json") | {"base_model_name_or_path": folder}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="replaced modules"):
        holdfast.load(tmp_path / "adapter")


def test_merging_is_refused_before_anything_is_loaded(world, tmp_path):
    data = recipe_data(world, tmp_path / "run", plan=["ControlLLM"], export={"merge": True})
    data["model"]["model_name_or_path"] = str(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"export\.merge is true, but what ControlLLM trains"):
        tune(write_recipe(tmp_path / "recipe.yaml", data))


def test_check_and_measure_take_it(finished, world):
    report = check(str(world.base), str(finished / "model"), limit=2, num_fewshot=1, suites=("in-context",), why=True)
    assert report["tuned"]["sha"] == models.fingerprint(str(finished / "model"))
    assert [f["name"] for f in report["diagnosis"]] and report["verdict"]["status"]


def test_a_killed_run_goes_on_to_the_same_folder(finished, world, tmp_path):
    class Killed(Exception):
        pass

    class Dies(Run):
        def __post_init__(self):
            super().__post_init__()
            self.tell = self.hear

        def hear(self, phase, share, words):
            if phase == "tune" and share > 0.6:
                raise Killed

    recipe = load_recipe(world.folder / "recipe.yaml", [f"training.output_dir={tmp_path / 'run'}"])
    with pytest.raises(Killed):
        go(Dies(recipe, world.folder))
    assert (tmp_path / "run" / "checkpoint" / "state.safetensors").is_file()
    go(Run(recipe, world.folder))
    ours, theirs = (models.fingerprint(str(f / "model")) for f in (tmp_path / "run", finished))
    assert ours == theirs


def test_own_tensors_are_what_the_base_lacks(tuned, tiny_model):
    own = own_tensors(tuned)
    assert own.keys() == {n for n in tuned.state_dict() if ".expanded." in n}
    assert not own.keys() & set(tiny_model(layers=4).state_dict())


# ---- inside a trainer


@pytest.fixture
def trainer(world, rows, tokenizer, tmp_path, texts):
    """A trainer with pairs on the base folder; keywords go to its arguments."""

    def build(given=None, kind=SFTTrainer, **options):
        config = {"output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 2,
                  "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
                  "learning_rate": 0.01, **options}  # fmt: skip
        data = Dataset.from_list(
            [{"input_ids": r.ids.tolist(), "labels": np.where(r.scored, r.ids, -100).tolist()} for r in texts]
        )
        base, _ = models.load(str(world.base), dtype="float32", device="cpu")
        given = {"model": base, "train_dataset": data, "eval_dataset": data, "processing_class": tokenizer,
                 **(given or {})}  # fmt: skip
        return with_plan(kind)(args=SFTConfig(**config), plan=Plan([PAIRS]), **given)

    return build


def test_a_trainer_saves_a_folder_for_holdfast_load(trainer, texts, tmp_path):
    made = trainer()
    made.train()
    made.save_model()
    assert not list((tmp_path / "out").glob("*.bin")) and not (tmp_path / "out" / "config.json").exists()
    loaded, _ = holdfast.load(tmp_path / "out", dtype="float32", device="cpu")
    assert torch.equal(forward(loaded, texts)[1], forward(made.model.eval(), texts)[1])


def test_a_trainer_goes_back_to_its_best_copies(trainer, tmp_path):
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    made = trainer(**every, load_best_model_at_end=True, learning_rate=0.5, lr_scheduler_type="constant")
    made.train()
    best = made.state.best_model_checkpoint
    assert not best.endswith("-4"), "the last step is the best: nothing to go back to"
    kept = load_file(f"{best}/replaced.safetensors")
    assert all(torch.equal(kept[n], v) for n, v in own_tensors(made.model).items())


def test_what_a_trainer_cannot_do_with_replaced_modules_is_refused(trainer, finished, world, tmp_path):
    with pytest.raises(PlanError, match="FSDP together with ControlLLM"):
        trainer(fsdp=True, fsdp_config={"version": 2})
    with pytest.raises(PlanError, match="use_reentrant=True gives replaced modules"):
        trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    replaced, _ = holdfast.load(finished / "model", dtype="float32", device="cpu")
    with pytest.raises(PlanError, match="replaced already"):
        trainer(given={"model": replaced})
    base, _ = holdfast.load(world.base, dtype="float32", device="cpu")
    config = DPOConfig(str(tmp_path / "dpo"), use_cpu=True, bf16=False, report_to=[])
    for method, words in ((PAIRS, "ControlLLM changes the training loss"), (Silent(), "Silent replaces modules")):
        with pytest.raises(PlanError, match=words):
            with_plan(DPOTrainer)(model=base, args=config, plan=Plan([method]))
    config = SFTConfig(str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to=[])
    config.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    with pytest.raises(PlanError, match="Silent replaces modules, but SFTTrainer under DeepSpeed"):
        with_plan(SFTTrainer)(model=base, args=config, plan=Plan([Silent()]))


def test_the_callback_measures_the_base_of_a_resumed_run(tuned, tiny_model, texts):
    from holdfast.verbs.callback import _base

    with _base(tuned, 3):
        assert torch.equal(forward(tuned, texts)[1], forward(tiny_model(layers=4), texts)[1])
