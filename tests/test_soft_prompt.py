"""A soft prompt works on every architecture that can read one, from training to the export; others are told before."""

import json

import pytest
import torch
import transformers as hf
from peft import PeftModel

from holdfast import models
from holdfast.engine.ways import SOFT_PROMPT
from holdfast.errors import PlanError
from holdfast.hosts import plain
from holdfast.measure import soft_prompt
from holdfast.measure.scorer import Scorer
from holdfast.methods import Freeze, LiNeS, ProMoT
from holdfast.plan import Host, Plan
from holdfast.recipe import load_recipe
from holdfast.services import Context
from holdfast.session import Session
from holdfast.verbs.explain import planned
from holdfast.verbs.tune import tune
from tiny import VOCAB, build_model
from tiny_run import make_world, recipe_data, write_recipe

MARKS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TEXT = {**MARKS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "max_position_embeddings": 4096}  # fmt: skip
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}  # fmt: skip
BUILD = {  # heads and layers: none, under other names, in a part of the configuration
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, use_mambapy=True, **MARKS)
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64,
                      context_length=4096, **MARKS)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=4096, **MARKS)),
    "ctrl": lambda: hf.CTRLLMHeadModel(
        hf.CTRLConfig(vocab_size=VOCAB, n_positions=4096, n_embd=32, dff=64, n_layer=2, n_head=4)
    ),
    "gemma3 with eyes": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=TEXT, vision_config=EYES, boi_token_index=396, eoi_token_index=397,
                        image_token_index=398)
    ),
}  # fmt: skip


def built(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILD[name]().eval()


class Deaf(hf.LlamaForCausalLM):
    """Takes no embeddings."""

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, use_cache=None, **more):
        assert "inputs_embeds" not in more, "no such argument"
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **more)


class TwiceRead(hf.LlamaForCausalLM):
    """Adds something of the tokens themselves to the first layer, which a prompt without tokens cannot have."""

    def forward(self, input_ids=None, inputs_embeds=None, **more):
        if input_ids is not None:
            table = self.get_input_embeddings()
            inputs_embeds = table(input_ids) + 0.5 * table(input_ids).flip(-1)
        return super().forward(inputs_embeds=inputs_embeds, **more)


def changed(kind):
    model = build_model()
    model.__class__ = kind
    return model


# ---- the check


@pytest.mark.parametrize("name", BUILD)
def test_the_check_leaves_no_trace(name, tokenizer):
    model = built(name).train()
    model.get_input_embeddings().requires_grad_(False)
    before = [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()]
    config = model.config.to_dict()
    soft_prompt.check_reading(model, tokenizer, "ProMoT")
    soft_prompt.check_export(model, tokenizer, "ProMoT")
    after = list(model.named_parameters())
    assert [n for n, *_ in before] == [n for n, _ in after] and model.training and not hasattr(model, SOFT_PROMPT)
    assert all(g == p.requires_grad and torch.equal(w, p) for (_, g, w), (_, p) in zip(before, after, strict=True))
    assert model.config.to_dict() == config


@pytest.mark.parametrize(("kind", "words"), [(Deaf, "no such argument"), (TwiceRead, "off those of the same tokens")])
def test_a_model_that_cannot_read_a_prompt_is_refused_by_name(kind, words, tokenizer):
    with pytest.raises(PlanError, match=words) as e:
        Plan([ProMoT()]).check(Host("any"), Context(changed(kind), tokenizer))
    assert "ProMoT" in e.value.what and kind.__name__ in e.value.what and "out of the plan" in e.value.cure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_that_one_reader_loses_is_noticed(monkeypatch, tokenizer, dtype):
    model = build_model()
    for weight in model.parameters():  # a random model is too sure of nothing for half precision to show a prompt
        weight.data.mul_(4 if weight.ndim > 1 else 1)
    model.to(dtype)
    soft_prompt.check_export(model, tokenizer, "ProMoT")
    plain_init = Scorer.__init__
    monkeypatch.setattr(Scorer, "__init__", lambda self, *a, soft_prompt, **k: plain_init(self, *a, **k))
    with pytest.raises(PlanError, match="scoring: log-probabilities are"):
        soft_prompt.check_export(model, tokenizer, "ProMoT")


def test_memory_is_no_fault_of_the_model(monkeypatch, tokenizer):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(soft_prompt, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        soft_prompt.check_reading(build_model(), tokenizer, "ProMoT")


def test_scoring_leaves_the_prompt_as_it_is(tokenizer):
    """CTRL scales the embeddings that it is given in place."""
    model, soft = built("ctrl"), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    kept, scorer = soft.clone(), Scorer(built("ctrl"), tokenizer, soft_prompt=soft)
    first = scorer.score_tokens([([5, 9, 40, 41], 1)])
    assert torch.equal(soft, kept) and scorer.score_tokens([([5, 9, 40, 41], 1)]) == first
    assert model.config.n_head == 4


# ---- the whole run


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tokenizer, rows):
    """run_of(name): the finished ProMoT run of that model, made once: (tuned model, prompt, folder)."""
    done = {}

    def go(name: str):
        if name not in done:
            folder = tmp_path_factory.mktemp("prompted")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HOLDFAST_HOME", str(folder / "home"))
                patch.setattr("tiny_run.POSITIONS", 4096)
                model = built(name)
                models.save_model(model, tokenizer, folder / "base", card=None)
                world = make_world(folder / "data", build_model(), tokenizer, rows)
                world.base = folder / "base"
                data = recipe_data(world, folder / "run", plan=[{"ProMoT": {"num_virtual_tokens": 3}}],
                                   training={"max_steps": 4}, measure={"suites": ["format"], "limit": 2})  # fmt: skip
                tune(write_recipe(folder / "r.yaml", data))
            done[name] = folder / "run"
        return done[name]

    return go


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_the_exported_prompt_does_in_peft_what_it_did_in_training(name, run_of):
    folder = run_of(name)
    tuned = hf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    prompted = PeftModel.from_pretrained(tuned, folder / "prompt").eval()
    soft = next(iter(prompted.prompt_encoder["default"].parameters())).detach()
    assert soft.shape == (3, 32) and json.loads((folder / "report.json").read_text())["kind"] == "tune"
    ids = torch.tensor([[20, 50, 90, 130, 200]])

    def ours(ids):
        return tuned(inputs_embeds=torch.cat([soft[None], tuned.get_input_embeddings()(ids)], 1), use_cache=False)

    with torch.no_grad():
        want = ours(ids).logits
        torch.testing.assert_close(prompted(input_ids=ids, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)
        greedy = ids
        for _ in range(4):
            greedy = torch.cat([greedy, ours(greedy).logits[:, -1:].argmax(-1)], 1)
        said = prompted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                                 use_cache=False, eos_token_id=VOCAB - 1, pad_token_id=2)  # fmt: skip
    assert said.tolist() == greedy.tolist()
    assert "use_cache=False" in (folder / "prompt" / "README.md").read_text(encoding="utf-8")


def test_it_is_told_before_any_training(monkeypatch, tokenizer, rows, tmp_path):
    world = make_world(tmp_path, build_model(), tokenizer, rows)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", recipe_data(world, tmp_path / "run", plan=["ProMoT"])))
    planned(recipe, tmp_path)
    monkeypatch.setattr(soft_prompt, "_with_peft", lambda *_: 1 / 0)
    monkeypatch.setattr(plain, "train", lambda *_a, **_k: pytest.fail("it trained"))
    with pytest.raises(PlanError, match="PEFT: ZeroDivisionError"):
        tune(recipe)
    assert not (tmp_path / "run" / "before.json").exists()


# ---- what else reads the configuration


def test_layers_are_counted_in_the_text_part(tokenizer):
    """Half of LiNeS goes by the number of layers: with 1 instead of 2 the top layer would be scaled like none is."""
    model = built("gemma3 with eyes")
    ctx = Context(model, tokenizer)
    Plan([Freeze(layers=1)]).check(Host("any"), ctx)
    with pytest.raises(PlanError, match="has 2 blocks"):
        Plan([Freeze(layers=3)]).check(Host("any"), ctx)
    assert Session(Plan([LiNeS()]), model, ctx).num_layers == 2
