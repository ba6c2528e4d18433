"""Merging on the disk: what it writes is what merging in memory makes, and a killed one leaves nothing."""

import json
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast import methods as hf
from holdfast import models
from holdfast.errors import ModelError, PlanError
from holdfast.models import shards
from holdfast.models.tensors import Saved
from holdfast.sites.merge_files import Pair, merge_files
from holdfast.sites.merging import Merging
from tiny import build_model

CHAINS = {
    "WiSEFT": [hf.WiSEFT(alpha=0.3)],
    "LiNeS": [hf.LiNeS(alpha=0.2)],
    "TIES": [hf.TIES(density=0.2)],
    "DARE": [hf.DARE(density=0.4)],
    "SLERP": [hf.SLERP(t=0.6)],
    "a chain with a survey": [hf.LiNeS(alpha=0.1), hf.TIES(density=0.3), hf.Breadcrumbs(density=0.5)],
}


def moved(model, by=0.02, seed=7):
    """The same model with every weight a little elsewhere."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.add_(torch.randn_like(p) * by)
    return model


@pytest.fixture(scope="module", params=[(True, torch.float32), (False, torch.bfloat16)], ids=["tied", "bf16"])
def pair(request, tmp_path_factory, tokenizer):
    """Folders of a base and of a tuned model in several files."""
    tied, dtype = request.param
    folder = tmp_path_factory.mktemp("pair")
    models.save_model(build_model(tied).to(dtype), tokenizer, folder / "base", card=None)
    tuned = moved(build_model(tied)).to(dtype)
    tuned.save_pretrained(folder / "tuned", max_shard_size="40KB")
    tokenizer.save_pretrained(folder / "tuned")
    return SimpleNamespace(base=folder / "base", tuned=folder / "tuned", dtype=dtype)


def in_memory(pair, methods, seed=0):
    """The merge of `sites.merging` on whole models."""
    base, tuned = (AutoModelForCausalLM.from_pretrained(p, dtype=pair.dtype) for p in (pair.base, pair.tuned))
    state = {m.name: {"seed": torch.tensor(seed)} if m.name == "DARE" else {} for m in methods}
    Merging(methods, state, None, 2).merge(tuned, {n: p.detach().clone() for n, p in base.named_parameters()})
    return dict(tuned.named_parameters())


@pytest.mark.parametrize("name", CHAINS)
def test_bit_for_bit_the_merge_in_memory(name, pair, tmp_path):
    out = merge_files(str(pair.base), str(pair.tuned), CHAINS[name], tmp_path / "out", seed=3)
    wanted = in_memory(pair, CHAINS[name], seed=3)
    got, before = (dict(AutoModelForCausalLM.from_pretrained(p, dtype="auto").named_parameters())
                   for p in (out, pair.tuned))  # fmt: skip
    assert all(torch.equal(got[n], p) and p.dtype == got[n].dtype for n, p in wanted.items())
    assert not all(torch.equal(got[n], p) for n, p in before.items())


@pytest.mark.parametrize("threads", [1, 2])
def test_bit_for_bit_in_pieces(threads, pair, tmp_path, monkeypatch):
    """Pieces that end within rows, two at a time; the second method sees what the first one made of a piece."""
    monkeypatch.setattr(shards, "PIECE", 331)
    chain = [hf.TIES(density=0.3), hf.TaskArithmetic(scale=0.7, models=(str(pair.tuned),)), hf.LiNeS(alpha=0.2)]
    asked, plain = [], shards.Parts.read
    monkeypatch.setattr(shards.Parts, "read", lambda self, *at: asked.append(at[2]) or plain(self, *at))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = merge_files(str(pair.base), str(pair.tuned), chain, tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert {part.stop - part.start for part in asked} >= {331, 32} and len(asked) > 100
    methods = Merging(chain, {m.name: {} for m in chain}, None, 2)
    base, tuned = (AutoModelForCausalLM.from_pretrained(p, dtype=pair.dtype) for p in (pair.base, pair.tuned))
    methods.open(base)
    methods.merge(tuned, {n: p.detach().clone() for n, p in base.named_parameters()})
    got = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert all(torch.equal(got.get_parameter(n), p) for n, p in tuned.named_parameters())


ENTRYWISE = [hf.WiSEFT(), hf.LiNeS(), hf.TIES(density=1, scale=0.5), hf.TaskArithmetic(), hf.ModelSoup(base=1)]


@pytest.mark.parametrize("method", ENTRYWISE, ids=lambda m: m.name)
def test_what_works_entry_by_entry_gives_the_same_in_pieces(method):
    assert method.entrywise() and not hf.TIES(trim="tensor").entrywise() and not hf.SLERP().entrywise()
    dice = torch.Generator().manual_seed(0)
    base, other = (torch.randn(70_001, generator=dice) for _ in range(2))
    weights = {"base": base, "tuned": base + 0.1 * other}
    cut = [dict(zip(weights, ws, strict=True)) for ws in zip(*(w.split(333) for w in weights.values()), strict=True)]
    name = "model.layers.1.x.weight"
    pieces = torch.cat([method.merge(name, piece, {}, 4) for piece in cut])
    assert torch.equal(pieces, method.merge(name, weights, {}, 4)) and not torch.equal(pieces, weights["tuned"])


def test_the_files_are_those_of_the_tuned_model(pair, tmp_path):
    out = merge_files(str(pair.base), str(pair.tuned), CHAINS["WiSEFT"], tmp_path / "out", card="what it is")
    files = sorted(p.name for p in pair.tuned.glob("*.safetensors*"))
    assert len(files) > 3 and sorted(p.name for p in out.glob("*.safetensors*")) == files
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((pair.tuned / index).read_text())
    assert (out / "README.md").read_text() == "what it is"
    text = "Ticket: my card"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(pair.tuned)(text)
    assert (out / files[0]).stat().st_mode == (out / "config.json").stat().st_mode


def test_what_is_no_parameter_is_copied(pair, tmp_path):
    shutil.copytree(pair.tuned, tmp_path / "tuned")
    file = sorted((tmp_path / "tuned").glob("*.safetensors"))[0]
    state = load_file(file) | {"model.rotary.inv_freq": torch.arange(4)}
    save_file(state, file, metadata={"format": "pt"})
    out = merge_files(str(pair.base), str(tmp_path / "tuned"), CHAINS["WiSEFT"], tmp_path / "out")
    assert torch.equal(load_file(out / file.name)["model.rotary.inv_freq"], torch.arange(4))


def test_an_adapter_is_merged_into_files_like_its_bases(pair, tmp_path):
    if pair.dtype is not torch.float32:
        pytest.skip("PEFT merges in the precision of the base, the stream in fp32")
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with models.peft_quiet():
        get_peft_model(AutoModelForCausalLM.from_pretrained(pair.base), config).save_pretrained(tmp_path / "adapter")
    out = merge_files(str(pair.base), str(tmp_path / "adapter"), CHAINS["WiSEFT"], tmp_path / "out")
    base, tuned = (
        models.load(str(p), dtype="float32", merge_adapter=True)[0] for p in (pair.base, tmp_path / "adapter")
    )
    got = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for name, p in base.named_parameters():
        assert torch.equal(got.get_parameter(name), torch.lerp(p, tuned.get_parameter(name), 0.3)), name


def test_a_change_is_carried_to_another_base(tmp_path, tokenizer):
    """new base + (old tuned - old base), which is what diff transfer and instruction residuals do."""
    folders = {n: str(tmp_path / n) for n in ("old", "new", "tuned")}
    for n, (name, by) in enumerate(zip(folders, (0.0, 0.01, 0.02), strict=True)):
        models.save_model(moved(build_model(), by, seed=n), tokenizer, folders[name], card=None)
    carry = hf.TaskArithmetic(models=(folders["old"],), weights=(1, -1), scale=1)
    out = merge_files(folders["new"], folders["tuned"], [carry], tmp_path / "out")
    old, new, tuned, got = (dict(AutoModelForCausalLM.from_pretrained(p).named_parameters())
                            for p in (*folders.values(), out))  # fmt: skip
    for name, p in got.items():
        torch.testing.assert_close(p, new[name] + (tuned[name] - old[name]), atol=1e-6, rtol=0)
        assert not torch.equal(p, tuned[name])
    same = merge_files(folders["old"], folders["tuned"], [carry], tmp_path / "same")
    for name, p in AutoModelForCausalLM.from_pretrained(same).named_parameters():
        torch.testing.assert_close(p, tuned[name], atol=1e-6, rtol=0)


def test_no_method_gives_the_tuned_model(pair, tmp_path):
    out = merge_files(str(pair.base), str(pair.tuned), [], tmp_path / "out")
    for file in pair.tuned.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_few_tensors_are_alive_at_a_time(pair, tmp_path, monkeypatch):
    """Bytes of tensors that were read and are still held stay below two copies of the largest."""
    seen, most = [], [0]
    plain = Saved.stored

    def stored(self, name):
        found = plain(self, name)
        seen.append(weakref.ref(found))
        most[0] = max(most[0], sum(t.nbytes for r in seen if (t := r()) is not None))
        return found

    both = Pair(str(pair.base), str(pair.tuned))
    monkeypatch.setattr(Saved, "stored", stored)
    both.write(CHAINS["TIES"], tmp_path / "out")
    largest = max(both.base_weights[n].nbytes for n in both.base_weights)
    assert len(seen) > 2 * len(both.base_weights) and most[0] <= 2 * largest


# ---- killed


KILLED = """
import os, signal, sys
from pathlib import Path
from holdfast import methods as hf
from holdfast.sites.merge_files import merge_files
def tell(share):
    if share > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
merge_files(sys.argv[1], sys.argv[2], [hf.WiSEFT(alpha=0.5)], Path(sys.argv[3]), tell=tell)
"""


def test_a_killed_merge_leaves_no_model_and_the_next_one_is_whole(pair, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, pair.base, pair.tuned, out], check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    merge_files(str(pair.base), str(pair.tuned), CHAINS["WiSEFT"], out)
    assert AutoModelForCausalLM.from_pretrained(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_merge_that_fails_leaves_the_older_model(pair, tmp_path):
    out = merge_files(str(pair.base), str(pair.tuned), CHAINS["WiSEFT"], tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def tell(share):
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(str(pair.base), str(pair.tuned), CHAINS["LiNeS"], out, tell=tell)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- refusals


def saved(folder: Path, tokenizer, **changes) -> str:
    models.save_model(build_model(**changes), tokenizer, folder, card=None)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 1}, "does not descend from the base"),
        ({"tied": False}, "does not tie its embeddings, and the base does"),
        ({"intermediate_size": 48}, "of shape"),
        ({"vocab_size": 408}, "of shape"),
    ],
    ids=["unrelated", "tied", "shapes", "vocabulary"],
)
def test_other_models_are_refused(changes, match, tmp_path, tokenizer):
    base = saved(tmp_path / "base", tokenizer)
    with pytest.raises(ModelError, match=match):
        merge_files(base, saved(tmp_path / "other", tokenizer, **changes), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def longer(tmp_path, tokenizer):
    """A base, and a tuned model with three tokens more and the rows for them."""
    base, tuned = saved(tmp_path / "base", tokenizer), moved(build_model(tied=False))
    models.save_model(build_model(tied=False), tokenizer, tmp_path / "base", card=None)
    own = AutoTokenizer.from_pretrained(base)
    own.add_tokens(["<one>", "<two>", "<three>"])
    with torch.random.fork_rng(devices=[]):
        tuned.resize_token_embeddings(len(own), mean_resizing=False)
    models.save_model(tuned, own, tmp_path / "tuned", card=None)
    return SimpleNamespace(base=base, tuned=str(tmp_path / "tuned"), rows=len(own) - 3, folder=tmp_path)


def test_other_tokens_are_refused_with_an_offer_and_the_overlap_is_merged(longer):
    """Half of the way in all rows that both have; the tuned model's own rows stay to the last bit."""
    with pytest.raises(ModelError, match="has another vocabulary than the base") as stop:
        Pair(longer.base, longer.tuned)
    assert f"{longer.rows} tokens are common: add --overlap" in stop.value.cure and "3 others stay" in stop.value.cure
    merge_files(longer.base, longer.tuned, [hf.WiSEFT(alpha=0.5)], longer.folder / "out", overlap=True)
    base, tuned, out = (
        dict(AutoModelForCausalLM.from_pretrained(p).named_parameters())
        for p in (longer.base, longer.tuned, longer.folder / "out")
    )
    for name, p in out.items():
        common = longer.rows if name in ("model.embed_tokens.weight", "lm_head.weight") else len(p)
        torch.testing.assert_close(p[:common], torch.lerp(base[name], tuned[name][:common], 0.5))
        assert torch.equal(p[common:], tuned[name][common:]) and len(p) == len(tuned[name])
    assert len(AutoTokenizer.from_pretrained(longer.folder / "out")) == longer.rows + 3


def test_no_offer_where_few_tokens_are_common(longer, tokenizer):
    text = json.loads((Path(longer.tuned) / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    moved_on = {t: (n + 100) % len(vocab) for t, n in vocab.items()}
    text["model"]["vocab"] = moved_on
    text["added_tokens"] = []
    (Path(longer.tuned) / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ModelError) as stop:
        Pair(longer.base, longer.tuned)
    assert "--overlap" not in stop.value.cure
    with pytest.raises(ModelError, match="tokens in common, of"):
        Pair(longer.base, longer.tuned, overlap=True)


def test_a_file_that_is_cut_off_is_named(tmp_path, tokenizer):
    base, tuned = (saved(tmp_path / name, tokenizer) for name in ("base", "tuned"))
    file = Path(tuned) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be read: model\.safetensors is missing, cut off"):
        Pair(base, tuned)


def test_adapters_on_other_bases_and_adapters_as_base_are_refused(tmp_path, tokenizer):
    base, other = saved(tmp_path / "base", tokenizer), saved(tmp_path / "other", tokenizer, seed=1)
    for name in (base, other):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(name), config).save_pretrained(f"{name}-adapter")
    with pytest.raises(ModelError, match=r"is an adapter on .*other.*, whose .* is not the base's"):
        Pair(base, f"{other}-adapter")
    with pytest.raises(ModelError, match="is an adapter, and the way back"):
        Pair(f"{other}-adapter", f"{base}-adapter")


def test_quantised_bases_and_strange_dtypes_are_refused(tmp_path, tokenizer):
    base, tuned = saved(tmp_path / "base", tokenizer), saved(tmp_path / "tuned", tokenizer)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    packed = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(packed))
    with pytest.raises(ModelError, match="is quantised with gptq"):
        Pair(base, tuned)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "tuned" / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"stores model\.norm\.weight as F8_E4M3"):
        Pair(base, tuned)


def test_methods_that_train_and_wrong_settings_are_refused(pair, tmp_path):
    both = Pair(str(pair.base), str(pair.tuned))
    for method, match in ((hf.KLToBase(), "KLToBase works at .*loss"), (hf.WiSEFT(alpha=2), "alpha is 2")):
        with pytest.raises(PlanError, match=match):
            both.write([method], tmp_path / "out")
    with pytest.raises(ModelError, match="is one of the two models"):
        both.write([], pair.base)
