"""Adapters on tied weights, on each other, with other vocabularies, and what is refused before weights are read."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from holdfast import models
from holdfast.engine import twins
from holdfast.errors import ModelError
from holdfast.models import loadable
from tiny import VOCAB, build_model

IDS = (5, 7, 9, 300)  # the tokens that some adapters train
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM", **settings})


KINDS = {
    "linear": lambda: lora(target_modules=["q_proj", "v_proj"]),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "head": lambda: lora(target_modules=["lm_head", "q_proj"]),
    "embeddings and head": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "tied embeddings": lambda: lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "saved embeddings": lambda: lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved head": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved both": lambda: lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lambda: lora(target_modules=["q_proj"], trainable_token_indices=list(IDS)),
    "tokens apart": lambda: lora(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 300], "lm_head": [7]}
    ),
    "DoRA embeddings": lambda: lora(target_modules=["embed_tokens"], use_dora=True),
    "DoRA head": lambda: lora(target_modules=["lm_head"], use_dora=True),
    "LoHa head": lambda: peft.LoHaConfig(r=4, alpha=16, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    "IA3 head": lambda: peft.IA3Config(
        target_modules=["lm_head", "k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    ),
    "only tokens": lambda: peft.TrainableTokensConfig(token_indices=list(IDS), task_type="CAUSAL_LM"),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"),
}
APART = ("embeddings", "head", "embeddings and head", "saved embeddings", "saved head", "saved both", "tokens apart",
         "DoRA embeddings", "DoRA head", "LoHa head", "IA3 head")  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """A saved tiny model with a tied head, and one without."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        yield {
            tied: models.save_model(build_model(tied), tokenizer, folder / f"tied {tied}", card=None)
            for tied in (True, False)
        }


def trained(model, config, seed=0):
    """`model` with an adapter whose every number was moved."""
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return adapted


def saved(base, config, folder, tokenizer, rows=VOCAB, **changes):
    """An adapter on the model in `base` resized to `rows`, trained and saved; returns it in memory."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows != VOCAB:
        model.resize_token_embeddings(rows, mean_resizing=False)
        torch.manual_seed(1)
        model.get_input_embeddings().weight.data[VOCAB:].normal_()
    model = trained(model, config)
    models.save_model(model, tokenizer, folder, card=None)
    edit(folder / "adapter_config.json", **changes)
    return model


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def apart(one, other):
    rows = twins.short_rows(one, IDS)
    return twins.distance(twins.logits_of(one, rows), twins.logits_of(other, rows))


def loaded(folder, **settings):
    return models.load(str(folder), **{"dtype": "float32", "device": "cpu", **settings})[0]


# --- merging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_never_changes_the_function(bases, tokenizer, tmp_path, kind, tied):
    want = saved(bases[tied], KINDS[kind](), tmp_path / "adapter", tokenizer)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert apart(want, plain) == 0 == apart(want, loaded(tmp_path / "adapter"))
    merged = loaded(tmp_path / "adapter", merge_adapter=True)
    assert not hasattr(merged, "peft_config") and apart(want, merged) < 1e-5
    assert apart(want, AutoModelForCausalLM.from_pretrained(bases[tied])) > 1e-3
    assert merged.config.tie_word_embeddings == (tied and kind not in APART)
    models.save_model(merged, tokenizer, tmp_path / "merged", card=None)
    assert apart(merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == 0


def test_plain_peft_moves_the_head_and_that_would_be_seen(bases, tokenizer, tmp_path):
    """What the limits must tell apart: the head that plain merging moves, and rounding in bf16."""
    want = saved(bases[True], KINDS["embeddings"](), tmp_path / "adapter", tokenizer)
    wrong = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload().eval()
    assert apart(want, wrong) > 2 * max(twins.ROUGH.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["linear", "embeddings", "head"])
def test_merging_in_halves_is_rounding_only(bases, tokenizer, tmp_path, kind, dtype):
    saved(bases[True], KINDS[kind](), tmp_path / "adapter", tokenizer)
    unmerged, merged = (loaded(tmp_path / "adapter", dtype=dtype, merge_adapter=m) for m in (False, True))
    assert merged.dtype == getattr(torch, dtype)
    limit = twins.ROUNDED[merged.dtype] / 3
    with twins.in_float32(unmerged), twins.in_float32(merged):
        assert 0 < apart(unmerged, merged) < limit
    assert {p.dtype for p in merged.parameters()} == {merged.dtype}


def test_a_merge_that_changes_the_function_is_refused(tokenizer):
    """peft leaves the head's bias out of single trained tokens until they are merged."""
    from transformers import PhiConfig, PhiForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=VOCAB, **small)).eval()
    model.lm_head.bias.data.normal_()
    config = lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [7]})
    with pytest.raises(ModelError, match=r"adapter X on base Y.*computes something else"):
        models.merged(trained(model, config), "adapter X on base Y")


def test_an_adapter_without_a_merge_is_refused_by_name(bases, tokenizer, tmp_path):
    config = peft.LilyConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved(bases[True], config, tmp_path / "adapter", tokenizer)
    with pytest.raises(ModelError, match="is not causal"):  # its router looks at the mean of all tokens
        loaded(tmp_path / "adapter")
    with pytest.raises(ModelError, match="LILY adapter cannot be folded"):
        loaded(tmp_path / "adapter", merge_adapter=True)


def test_three_adapters_on_each_other(bases, tokenizer, tmp_path):
    below, model = bases[True], None
    for n, kind in enumerate(("linear", "embeddings", "head")):
        model = trained(loaded(below, merge_adapter=True), KINDS[kind](), seed=n)
        if n:
            with pytest.raises(ModelError, match="merged, and plain peft would load it without"):
                models.save_model(model, tokenizer, tmp_path / str(n), card=None)
        model.save_pretrained(tmp_path / str(n))  # as plain peft does, which names the adapter below
        tokenizer.save_pretrained(tmp_path / str(n))
        below = tmp_path / str(n)
    source = models.resolve(str(below))
    assert source.base.base.base.path == str(bases[True])
    assert apart(model, loaded(below)) < 1e-5
    assert apart(model, loaded(below, merge_adapter=True)) < 1e-5


# --- other vocabularies ------------------------------------------------------------------------------


@pytest.fixture
def more_tokens(tokenizer):
    import copy

    grown = copy.deepcopy(tokenizer)
    assert len(grown) == VOCAB and grown.add_tokens(["<one>", "<two>", "<three>"]) == 3
    return grown


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [VOCAB + 3, VOCAB + 16], ids=["as many as tokens", "padded"])
@pytest.mark.parametrize("kind", ["linear", "embeddings", "head", "saved both", "tokens"])
def test_a_grown_vocabulary_is_loaded(bases, more_tokens, tmp_path, kind, rows, tied):
    config = KINDS[kind]()
    if kind == "tokens":
        config.trainable_token_indices = [5, VOCAB, VOCAB + 1]
    want = saved(bases[tied], config, tmp_path / "adapter", more_tokens, rows=rows)
    if not tied and kind in ("embeddings", "head"):  # peft saves the new rows of what the adapter works on, alone
        with pytest.raises(ModelError, match=f"with {rows} tokens, its base has {VOCAB}, and it lacks"):
            loaded(tmp_path / "adapter")
        return
    check = [VOCAB, VOCAB + 1, VOCAB + 2]
    for merge in (False, True):
        got = loaded(tmp_path / "adapter", merge_adapter=merge)
        assert got.get_input_embeddings().weight.shape[0] == rows == got.config.vocab_size
        ids = twins.short_rows(want, check)
        assert twins.distance(twins.logits_of(want, ids), twins.logits_of(got, ids)) < 1e-5
    models.save_model(got, more_tokens, tmp_path / "merged", card=None)
    assert apart(got, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == 0


def test_a_shrunk_vocabulary_is_loaded(bases, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases[True])
    model.resize_token_embeddings(VOCAB + 40, mean_resizing=False)
    padded = models.save_model(model, tokenizer, tmp_path / "padded", card=None)
    want = saved(padded, KINDS["embeddings"](), tmp_path / "adapter", tokenizer)  # with VOCAB + 40 rows
    assert apart(want, loaded(tmp_path / "adapter", merge_adapter=True)) < 1e-5
    model = AutoModelForCausalLM.from_pretrained(padded)
    model.resize_token_embeddings(VOCAB)
    want = trained(model, KINDS["embeddings"]())
    models.save_model(want, tokenizer, tmp_path / "shrunk", card=None)
    assert apart(want, loaded(tmp_path / "shrunk", merge_adapter=True)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "embeddings"])
def test_new_rows_that_were_never_saved_are_named(bases, more_tokens, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(bases[True])
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    trained(model, KINDS[kind]()).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    more_tokens.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"{VOCAB + 3} tokens, its base .*{VOCAB}") as error:
        loaded(tmp_path / "adapter")
    assert "save_embedding_layers=True" in error.value.cure


def test_trained_new_tokens_need_no_rows_of_the_base(bases, more_tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases[True])
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    new = [VOCAB, VOCAB + 1, VOCAB + 2]
    want = trained(model, lora(target_modules=["q_proj"], trainable_token_indices=new))
    want.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    more_tokens.save_pretrained(tmp_path / "adapter")
    got = loaded(tmp_path / "adapter", merge_adapter=True)
    rows = twins.short_rows(want, new)
    assert twins.distance(twins.logits_of(want, rows), twins.logits_of(got, rows)) < 1e-5


def test_two_heads_for_a_tied_base(bases, more_tokens, tmp_path):
    """Trained on an untied copy of a base whose own head is tied: plain peft lets one of the two win."""
    model = AutoModelForCausalLM.from_pretrained(bases[False])
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    want = trained(model, KINDS["linear"]())
    want.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    more_tokens.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(bases[True]))
    got, theirs = loaded(tmp_path / "adapter", merge_adapter=True), want.merge_and_unload()
    assert not torch.equal(got.get_input_embeddings().weight, got.get_output_embeddings().weight)
    assert torch.equal(got.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    assert torch.equal(got.get_output_embeddings().weight, theirs.get_output_embeddings().weight)


# --- adapters that are refused ------------------------------------------------------------------------


VIRTUAL = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("merge", [True, False])
def test_virtual_tokens_are_refused_by_name(bases, tokenizer, tmp_path, kind, merge):
    saved(bases[True], VIRTUAL[kind](), tmp_path / "adapter", tokenizer)
    with pytest.raises(ModelError, match=f"of type {kind}: it puts 4 virtual tokens") as error:
        loaded(tmp_path / "adapter", merge_adapter=merge)
    assert str(bases[True]) in error.value.cure and "whole" not in error.value.cure


CHANGES = {
    "unknown type": ({"peft_type": "MAGIC"}, "type MAGIC, which the installed peft"),
    "no type": ({"peft_type": None}, "type None"),
    "replicated": ({"layer_replication": [[0, 1], [0, 2]]}, "uses layer_replication"),
    "activated": ({"alora_invocation_tokens": [3, 4]}, "uses alora_invocation_tokens"),
    "no targets": ({"target_modules": ["query_key_value"]}, "adapts query_key_value, and the base has only"),
    "half a config": ({"r": 0}, "not one of a LORA adapter|Cannot load"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_configurations_of_adapters(bases, tokenizer, tmp_path, change):
    changes, match = CHANGES[change]
    saved(bases[True], KINDS["linear"](), tmp_path / "adapter", tokenizer, **changes)
    with pytest.raises(ModelError, match=match):
        loaded(tmp_path / "adapter", merge_adapter=True)


OTHERS = {
    "deeper": ({"layers": 3}, r"changes model\.layers\.2\..*, which the base does not have"),
    "wider": ({"hidden_size": 48}, r"self_attn\.q_proj it (reads|gives) 48 numbers, where the base has 32"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_model(bases, tokenizer, tmp_path, other):
    settings, match = OTHERS[other]
    models.save_model(build_model(**settings), tokenizer, tmp_path / "other", card=None)
    saved(tmp_path / "other", KINDS["linear"](), tmp_path / "adapter", tokenizer,
          base_model_name_or_path=str(bases[True]))  # fmt: skip
    with pytest.raises(ModelError, match=match) as error:
        loaded(tmp_path / "adapter", merge_adapter=True)
    assert "base_model_name_or_path" in error.value.cure


def test_an_adapter_of_another_architecture(bases, tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2))
    trained(model, lora(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(bases[True]))
    with pytest.raises(ModelError, match="adapts c_attn, and the base has only"):
        loaded(tmp_path / "adapter")


@pytest.mark.parametrize("what", ["more", "fewer"])
def test_weights_without_a_place_and_places_without_a_weight(bases, tokenizer, tmp_path, what):
    """peft loads what fits and leaves the rest out."""
    from safetensors.torch import load_file, save_file

    saved(bases[True], KINDS["linear"](), tmp_path / "adapter", tokenizer)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    if what == "more":
        state["base_model.model.score.weight"] = torch.zeros(2, 32)
    else:
        state.pop(next(k for k in state if "layers.1.self_attn.v_proj.lora_B" in k))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no place for" if what == "more" else "its file lacks"):
        loaded(tmp_path / "adapter", merge_adapter=True)


# --- quantised checkpoints ----------------------------------------------------------------------------

PACKED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "older bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
    "hqq": ({"quant_method": "hqq"}, "hqq"),
}
MODULES = {"gptq": "optimum", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors", "torchao": "torchao",
           "quanto": "optimum", "hqq": "hqq"}  # fmt: skip


@pytest.mark.parametrize("method", PACKED)
def test_packed_weights_without_their_package(bases, tmp_path, method):
    from importlib.util import find_spec

    if find_spec(MODULES.get(method, "bitsandbytes")):
        pytest.skip("its package is installed")
    config, package = PACKED[method]
    shutil.copytree(bases[True], tmp_path / "packed")
    edit(tmp_path / "packed" / "config.json", quantization_config=config)
    with pytest.raises(ModelError, match=f"is quantised with {method.removeprefix('older ')}") as error:
        loaded(tmp_path / "packed")
    assert f"pip install {package}" in error.value.cure and "unquantised" in error.value.cure


def test_an_adapter_on_packed_weights_names_the_base(bases, tokenizer, tmp_path):
    saved(bases[True], KINDS["linear"](), tmp_path / "adapter", tokenizer)
    shutil.copytree(bases[True], tmp_path / "packed")
    edit(tmp_path / "packed" / "config.json", quantization_config={"quant_method": "exl2", "bits": 4})
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "packed"))
    with pytest.raises(ModelError, match=r"packed \(folder.*quantised with exl2, which transformers cannot read"):
        loaded(tmp_path / "adapter")


def test_packed_weights_that_nothing_explains(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bases[True], tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.qweight"] = state.pop("model.layers.0.mlp.up_proj.weight").to(torch.int32)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"qweight.*no quantization_config"):
        loaded(tmp_path / "packed")


def test_a_plain_model_is_not_taken_for_a_packed_one(bases):
    source = models.resolve(str(bases[True]))
    assert loadable.quantisation(source) is None
    loadable.may_unpack(source)
