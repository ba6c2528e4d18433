"""Candidates of a repair that look at rows: masks in files, what each is made of, and what is refused."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from holdfast import cli, models
from holdfast.errors import HoldfastError
from holdfast.runs import antidote, repair_search
from holdfast.runs.repair_made import ANTIDOTE, GRAFT, REALIGN, Masked, check_pair, made, read_harmful, write_masks
from holdfast.sites.merge_files import Pair
from holdfast.verbs.repair import repair
from tiny import build_model, ticket_rows
from tiny_run import make_world

ROWS = {"prompt": "{text}", "completion": " {queue}", "metric": "loss"}
FEW = {GRAFT: [{"share": 0.05, "steps": 1}], REALIGN: [{"rate": 0.01, "steps": 1}], ANTIDOTE: [{"ratio": 0.25}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A base, the same a little elsewhere, harmful rows and rows of the task."""
    folder = tmp_path_factory.mktemp("made")
    found = make_world(folder, build_model(), tokenizer, ticket_rows())
    tuned, dice = build_model(), torch.Generator().manual_seed(1)
    for p in tuned.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=dice)
    models.save_model(tuned, tokenizer, folder / "tuned", card=None)
    bad = [{"prompt": r.prompt, "completion": r.completion} for r in ticket_rows()[:4]]
    harmful = folder / "harmful.jsonl"
    harmful.write_text("\n".join(map(json.dumps, bad)), encoding="utf-8")
    return SimpleNamespace(
        base=str(found.base), tuned=str(folder / "tuned"), data=str(found.train), harmful=str(harmful), folder=folder
    )


def weights(path):
    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


def test_masks_by_hand(tmp_path):
    file = tmp_path / "m.safetensors"
    mask = torch.arange(10).view(2, 5) % 3 == 0  # no multiple of eight entries
    write_masks({"a": mask}, file)
    base, tuned = torch.full((2, 5), 1.0), torch.full((2, 5), 2.0)
    ends = {"base": base, "tuned": tuned}
    graft = Masked(file=str(file), inside="tuned", outside="base")
    assert torch.equal(graft.merge("a", ends, {}, 1), torch.where(mask, 2.0, 1.0))
    assert graft.merge("b", ends, {}, 1) is base
    zero = Masked(file=str(file), inside="zero", outside="tuned")
    assert torch.equal(zero.merge("a", ends, {}, 1), torch.where(mask, 0.0, 2.0))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.filterwarnings("ignore:The tokenizer has new")
def test_each_is_looked_at_like_a_merge_and_written(world, tmp_path, monkeypatch):
    """A bound that all meet: the best of the three is written, and is what its name says."""
    for name, grid in FEW.items():
        monkeypatch.setitem(repair_search.GRID, name, grid)
    suite = tmp_path / "ask.jsonl"
    suite.write_text("".join(f'{{"text": "Order {n} is open and late."}}\n' for n in range(16)))
    asked = {"suites": [f"jsonl:{suite}"], "keep": {f"jsonl:{suite}": 0.1}, "methods": tuple(FEW)}
    got = repair(world.base, world.tuned, tmp_path / "out", data=world.data, harmful=world.harmful, **ROWS, **asked)
    seen = {p["method"] for p in got["points"]}
    assert {"base", "tuned model", GRAFT, ANTIDOTE, REALIGN} == seen
    files = sorted(p.name for p in (tmp_path / "out" / "made").iterdir())
    assert [f.split("-")[0] for f in files] == [ANTIDOTE, GRAFT, REALIGN]


def test_what_each_is_made_of(world, tmp_path, tokenizer):
    pair, base, tuned = Pair(world.base, world.tuned), weights(world.base), weights(world.tuned)
    harmful = read_harmful(world.harmful, tokenizer)
    counts = {}
    for name, (settings,) in FEW.items():
        method = made(name, settings, pair, harmful, harmful, tmp_path / f"{name}.safetensors")
        out = dict(pair.merged([method]))
        inside, outside = {
            GRAFT: (tuned, base), REALIGN: (base, tuned), ANTIDOTE: ({n: 0 * w for n, w in tuned.items()}, tuned),
        }[name]  # fmt: skip
        for n, w in out.items():
            assert bool(((w == inside[n]) | (w == outside[n])).all()), (name, n)
        counts[name] = sum(int((w != outside[n]).sum()) for n, w in out.items())
    assert min(counts.values()) > 0
    model = models.load(world.tuned)[0]
    antidote.prune(model, [r.ids.tolist() for r in harmful], ratio=0.25)
    assert all(torch.equal(p == 0, out[n] == 0) for n, p in model.named_parameters())  # ANTIDOTE was the last


def test_an_adapter_is_pruned_in_its_factors(world, tmp_path, tokenizer):
    config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    with models.peft_quiet():
        for name, more in (("plain", {}), ("dora", {"use_dora": True})):
            base = AutoModelForCausalLM.from_pretrained(world.base)
            get_peft_model(base, LoraConfig(**config, **more)).save_pretrained(tmp_path / name)
    pair, harmful = Pair(world.base, str(tmp_path / "plain")), read_harmful(world.harmful, tokenizer)
    check_pair([ANTIDOTE], pair)
    out = dict(pair.merged([made(ANTIDOTE, {"ratio": 0.5}, pair, [], harmful, tmp_path / "a.safetensors")]))
    model = models.load(str(tmp_path / "plain"), dtype="float32")[0]
    antidote.prune(model, [r.ids.tolist() for r in harmful], ratio=0.5)
    with models.peft_quiet():
        merged = dict(model.merge_and_unload().named_parameters())
    for n, w in merged.items():
        torch.testing.assert_close(out[n], w.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(HoldfastError, match="antidote prunes the factors of plain LoRA"):
        check_pair([ANTIDOTE], SimpleNamespace(tuned=models.resolve(str(tmp_path / "dora"))))
    with torch.device("meta"):
        like = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))  # its maps have other names
    with pytest.raises(HoldfastError, match="has none by the names q_proj"):
        check_pair([ANTIDOTE], SimpleNamespace(tuned=models.resolve(world.base), like=like))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "antidote"], "antidote reads harmful prompts with their answers, and none are given"),
        (["--harmful", "x.jsonl"], "--harmful is read by antidote and realign alone"),
        (["--method", "ACU"], "repair cannot try ACU: its head stands beside"),
    ],
)
def test_usage_mistakes_exit_with_2(words, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["holdfast", "repair", world.base, world.tuned, "-o", str(tmp_path), *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
