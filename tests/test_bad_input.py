"""Mistakes on the real command line: exit code 2, what is wrong, what to do, no traceback, and before long work."""

import errno
import json
import resource
import shutil
import sys
from collections import namedtuple

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from holdfast import cli
from holdfast.data.rows import Row
from holdfast.verbs import ending
from tiny_run import make_world, recipe_data, write_recipe, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tokenizer, rows):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_HOME", str(folder / "home"))
        here = make_world(folder, tiny_model(), tokenizer, rows)
        here.short = shutil.copytree(here.base, folder / "short")
        change_json(here.short / "config.json", max_position_embeddings=256)
        here.broken = shutil.copytree(here.base, folder / "broken")
        (here.broken / "model.safetensors").write_bytes(b"no weights")
        here.nan = shutil.copytree(here.base, folder / "nan")
        weights = load_file(here.nan / "model.safetensors")
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, here.nan / "model.safetensors", {"format": "pt"})
        write_rows(folder / "unseen.jsonl", [*rows[:3], Row("Ticket: hello\nQueue:", " complaints")])
        yield here


@pytest.fixture
def tune(world, tmp_path, monkeypatch, capsys):
    """tune(recipe changes, options): (exit code, stderr) of `holdfast tune` on that recipe."""

    def run(changes=None, *options: str, text: str | None = None):
        data = recipe_data(world, tmp_path / "run", **(changes or {}))
        path = write_recipe(tmp_path / "recipe.yaml", data)
        if text is not None:
            path.write_text(text, encoding="utf-8")
        return command(monkeypatch, capsys, "tune", str(path), *options)

    return run


def command(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["holdfast", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    return end.value.code or 0, told.err


def change_json(path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def rows_file(name: str, *lines: str):
    """A data section with a training file of these lines, written when the case runs."""

    def make(folder):
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
        return {"data": {"train": str(folder / name)}}

    return make


def chat_file(name: str, answer: dict, **columns):
    """The same with one conversation, which ends in this answer."""
    row = {"messages": [{"role": "user", "content": "hi"}, answer], **columns}

    def make(folder):
        data = rows_file(name, json.dumps(row))(folder)["data"]
        return {"data": {**data, "prompt": None, "completion": None}}

    return make


ANSWER = {"role": "assistant", "content": "yo"}
GOOD = json.dumps({"text": "Ticket: hello\nQueue:", "queue": "other"})

# name: (changes of the recipe, or a function of the folder that gives them; what the message must say)
CASES = {
    "unknown model": (
        {"model": {"model_name_or_path": "nobody/nothing"}},
        ["No model 'nobody/nothing'", "not in the local hub cache", "A hub id needs the hub"],
    ),
    "alias misspelt": (
        {"model": {"model_name_or_path": "smollm2-135"}},
        ["No model 'smollm2-135'", "Did you mean 'smollm2-135m'?"],
    ),
    "model without weights": (
        lambda f: {"model": {"model_name_or_path": str(f / "broken")}},
        ["Cannot load the model", "broken", "Check that the folder is whole"],
    ),
    "weights with NaN": (
        lambda f: {"model": {"model_name_or_path": str(f / "nan")}},
        ["model.norm.weight of", "nan is not finite", "Copy or download the model again"],
    ),
    "unreadable row": (
        rows_file("torn.jsonl", GOOD, GOOD, '{"text": "half'),
        ["torn.jsonl:3: not valid JSON", "Each line must be one JSON object"],
    ),
    "row that is no object": (rows_file("list.jsonl", GOOD, "[1, 2]"), ["list.jsonl:2: a list, not an object"]),
    "no number": (
        rows_file("inf.jsonl", GOOD, '{"text": "a", "queue": Infinity}'),
        ["inf.jsonl:2: column 'queue' holds Infinity", "Write a finite number"],
    ),
    "key twice": (
        rows_file("twice.jsonl", GOOD, '{"text": "a", "queue": "b", "queue": "c"}'),
        ["twice.jsonl:2: the key 'queue' is given twice", "Keep one of the two"],
    ),
    "empty answer of a conversation": (chat_file("empty.jsonl", ANSWER | {"content": ""}), [
        "empty.jsonl:1: the answer, message 2 (assistant), is empty", "Remove the row"]),
    "answer of weight 0": (chat_file("weight.jsonl", ANSWER | {"weight": 0}), [
        "weight.jsonl:1: the answer is marked not to be trained on (weight 0)", "or the key 'weight'"]),
    "thinking that is not rendered": (chat_file("muse.jsonl", ANSWER | {"reasoning_content": "I muse"}), [
        "muse.jsonl:1: ", "writes nothing, or not all, of 'reasoning_content'", "Use a model whose"]),
    "tools that are not rendered": (chat_file("tools.jsonl", ANSWER, tools='[{"name": "f"}]'), [
        "tools.jsonl:1: ", "writes nothing of 'tools'"]),
    "missing column": (
        {"data": {"prompt": "{body}"}},
        ["train.jsonl:1: no column 'body'", "the row has text, queue"],
    ),
    "column misspelt": ({"data": {"prompt": "{txt}"}}, ["no column 'txt'", "Did you mean 'text'?"]),
    "column gone in a later row": (rows_file("gap.jsonl", GOOD, '{"text": "a"}'), ["gap.jsonl:2: no column 'queue'"]),
    "no such file": ({"data": {"train": "tikets.jsonl"}}, ["tikets.jsonl: no such file in"]),
    "label unseen in training": (
        lambda f: {"data": {"test": str(f / "unseen.jsonl")}},
        ["unseen.jsonl:4: the label ' complaints'", "does not occur in the training rows", "Known:", "data.metric:"],
    ),
    "empty file": (rows_file("empty.jsonl", ""), ["empty.jsonl: holds no rows", "Check the path"]),
    "nothing to test on": (
        {"data": {"validation_size": 0}},
        ["recipe.yaml:4: data does not agree with itself", "validation or test set"],
    ),
    "empty cut": ({"data": {"validation_size": 24}}, ["Cannot cut 24 of 24 rows", "data.validation_size"]),
    "row too long": (
        {"data": {"max_length": 20, "too_long": "refuse"}},
        ["train.jsonl:1 has 22 tokens", "more than max_length 20", "Raise data.max_length"],
    ),
    "most rows too long": (
        {"data": {"max_length": 20}},
        ["17 of 18 rows are longer than max_length 20", "data.too_long: truncate or split"],
    ),
    "suite misspelt": ({"measure": {"suites": ["in-contxt"]}}, ["'in-contxt'", "Did you mean 'in-context'?"]),
    "second suite misspelt": ({"measure": {"suites": ["in-context", "ancors"]}}, ["'ancors'", "'anchors'?"]),
    "shots too long for the model": (
        lambda f: {"model": {"model_name_or_path": str(f / "short")}, "measure": {"num_fewshot": 40}},
        ["'in-context' at 40 shots needs", "the model reads 256", "Lower measure.num_fewshot"],
    ),
    "more shots than items": ({"measure": {"num_fewshot": 500}}, ["too few for 500 shots", "num_fewshot"]),
    "method misspelt": ({"plan": ["LoRa"]}, ["'LoRa', which is not a method", "Did you mean 'LoRA'?"]),
    "setting misspelt": (
        {"plan": [{"LoRA": {"rnk": 4}}]},
        ["LoRA has no setting 'rnk'", "Did you mean 'r'?"],
    ),
    "setting of the wrong kind": (
        {"plan": [{"LoRA": {"r": "eight"}}]},
        ["LoRA.r is 'eight', but it is a whole number", "without quotes"],
    ),
    "setting without sense": ({"plan": [{"LoRA": {"r": 0}}]}, ["LoRA.r is 0", "a rank is at least 1", "r: 16"]),
    "methods in conflict": (
        {"plan": ["LoRA", "HalfFineTune"]},
        ["HalfFineTune works on the model's own weights", "LoRA freezes them", "Keep HalfFineTune and drop LoRA"],
    ),
    "method twice": ({"plan": ["LoRA", "LoRA"]}, ["LoRA stands twice", "Keep one LoRA"]),
    "unknown key": (
        {"training": {"learning_rat": 1}},
        ["recipe.yaml:15: training.learning_rat is not a known key", "Did you mean 'learning_rate'?"],
    ),
    "wrong type": ({"training": {"seed": "one"}}, ["recipe.yaml:15: training.seed is 'one'", "a whole number"]),
    "checkpoints that are not kept": (
        {"training": {"save_total_limit": 3}},
        ["training.save_total_limit is 3", "keeps one checkpoint", "Remove training.save_total_limit"],
    ),
    "number types in conflict": (
        {"model": {"dtype": "bfloat16"}, "training": {"bf16": False}},
        ["training.bf16 is false", "model.dtype is bfloat16", "Remove one"],
    ),
    "export over other files": (
        lambda f: {"export": {"folder": str(f)}},
        [" is not only a model (", "Choose another folder"],
    ),
}  # fmt: skip
WEIGHTS = ("unknown model", "alias misspelt", "model without weights", "weights with NaN", "setting without sense",
           "shots too long for the model")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_before_any_work(world, tune, tmp_path, case):
    changes, words = CASES[case]
    code, told = tune(changes(world.folder) if callable(changes) else changes)
    assert code == 2, told
    assert told.startswith("Error: ") and [w for w in words if w not in told] == []
    assert not (tmp_path / "run" / "before.json").exists()


@pytest.mark.parametrize("case", [c for c in CASES if c not in WEIGHTS])
def test_it_is_told_before_the_weights_are_read(world, tune, case):
    changes, words = CASES[case]
    changes = dict(changes(world.folder) if callable(changes) else changes)
    changes["model"] = {"model_name_or_path": str(world.broken), **changes.get("model", {})}
    code, told = tune(changes)
    assert code == 2 and words[0] in told


def test_a_mended_recipe_goes_on_in_the_same_folder(tune, tmp_path):
    assert tune({"plan": ["LoRa"]})[0] == 2
    assert tune({"training": {"max_steps": 1}})[0] == 0
    assert (tmp_path / "run" / "report.json").is_file()


# ---- the recipe file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", ["recipe.yaml:1", "not valid YAML"]),
        ("", ["recipe.yaml: the file is empty"]),
        ("model: {model_name_or_path: a}\n", ["recipe.yaml: data is missing"]),
        ("- a\n", ["recipe.yaml: holds no keys"]),
    ],
)
def test_a_broken_recipe(tune, tmp_path, text, words):
    code, told = tune(text=text)
    assert code == 2 and [w for w in words if w not in told] == []
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe(monkeypatch, capsys, tmp_path):
    code, told = command(monkeypatch, capsys, "tune", str(tmp_path / "none.yaml"))
    assert code == 2 and "none.yaml: there is no such file" in told and "Check the path" in told


@pytest.mark.parametrize("override", ["training", "training.sed=1", "plan.7.LoRA.r=1"])
def test_a_wrong_override(tune, override):
    code, told = tune({}, "--set", override)
    assert code == 2 and told.startswith("Error: ") and override.split("=")[0].split(".")[-1][:3] in told


# ---- the run folder


def test_a_folder_with_other_files(tune, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    code, told = tune()
    assert code == 2 and "not empty and holds no Holdfast run" in told and "output_dir" in told
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_in_the_way(tune, tmp_path, inside):
    (tmp_path / "file").touch()
    code, told = tune({"training": {"output_dir": str(tmp_path / "file" / inside)}})
    assert code == 2 and f"{tmp_path / 'file' / inside}" in told and "cannot be written" in told


def test_a_folder_of_another_recipe(tune, tmp_path):
    assert tune({"training": {"max_steps": 1}})[0] == 0
    before = (tmp_path / "run" / "report.json").read_bytes()
    code, told = tune({"training": {"max_steps": 2}})
    assert code == 2 and "holds a run of another recipe" in told and "another training.output_dir" in told
    assert (tmp_path / "run" / "report.json").read_bytes() == before


# ---- no room


def test_too_little_disk_is_told_before_any_work(tune, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    code, told = tune()
    assert code == 2 and f"{tmp_path / 'run'} has 0.0 GB free" in told and "Free some disk space" in told
    assert not (tmp_path / "run" / "before.json").exists()


def full(save):
    """A write that the operating system stops half-way (safetensors reports it as an error of its own)."""

    def stopped(*args, **keys):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        try:
            save(*args, **keys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return stopped


def no_space(_):
    def stopped(*args, **keys):
        raise OSError(errno.ENOSPC, "No space left on device")

    return stopped


@pytest.mark.parametrize(("stop", "why"), [(full, "File too large"), (no_space, "No space left on device")])
def test_a_full_disk_loses_nothing_finished(tune, tmp_path, stop, why):
    save, calls = safetensors.torch.save_file, []

    def second_fails(*args, **keys):
        calls.append(args)
        (stop(save) if len(calls) == 2 else save)(*args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", second_fails)
        code, told = tune()
    folder = tmp_path / "run"
    assert code == 2 and "The checkpoint of step 4" in told and why in told and "Free some disk space" in told
    assert (folder / "before.json").is_file()
    assert json.loads((folder / "checkpoint" / "state.json").read_text())["step"] == 2  # the one before
    assert not (folder / "checkpoint.new").exists()
    assert tune()[0] == 0  # the same command, with room again
    assert (folder / "report.json").is_file()


def test_a_full_disk_at_the_export(tune, tmp_path, monkeypatch):
    from peft import PeftModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", full(PeftModel.save_pretrained))
        code, told = tune()
    assert code == 2 and f"The tuned model in {tmp_path / 'run' / 'model'} could not be written" in told
    assert (tmp_path / "run" / "checkpoint").is_dir()
    assert tune()[0] == 0


# ---- training that diverges


def test_a_loss_that_explodes(tune, tmp_path):
    code, told = tune({"training": {"learning_rate": 1e12, "save_steps": 1, "warmup_steps": 2}, "plan": []})
    folder = tmp_path / "run"
    assert code == 2 and "learning_rate" in told
    assert "The loss is " in told or "is not finite after step" in told
    assert (folder / "before.json").is_file() and not (folder / "training.json").exists()
    state = load_file(folder / "checkpoint" / "state.safetensors")
    assert all(torch.isfinite(v).all() for k, v in state.items() if k.startswith("param/"))


def test_weights_that_explode_in_the_last_step(tune, tmp_path):
    code, told = tune({"training": {"learning_rate": 1e38, "max_steps": 1, "warmup_steps": 0,
                                    "lr_scheduler_type": "constant", "weight_decay": 1e6}, "plan": []})  # fmt: skip
    assert code == 2 and "of the tuned model is not finite" in told
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "before.json").is_file()


# ---- what the command line adds


def test_debug_shows_the_traceback(world, tmp_path, monkeypatch, capsys):
    path = write_recipe(tmp_path / "recipe.yaml", recipe_data(world, tmp_path / "run", plan=["LoRa"]))
    monkeypatch.setattr(sys, "argv", ["holdfast", "tune", str(path), "--debug"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" in told and "PlanError: The plan names 'LoRa'" in told


def raising(error):
    def go(self):
        raise error

    return go


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "The same command goes on from where it was"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "per_device_train_batch_size"),
        (MemoryError(), 2, "not enough memory"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "Permission denied (/data/x)"),
    ],
    ids=["ctrl-c", "gpu memory", "memory", "rights"],
)
def test_what_is_no_mistake_of_the_recipe(tune, monkeypatch, error, code, words):
    monkeypatch.setattr("holdfast.verbs.tune.go", raising(error))
    got, told = tune()
    assert got == code and words in told


@pytest.mark.parametrize("command", ["tune", "repair", "compare"])
def test_what_goes_on_says_so(capsys, command):
    assert ending.end(KeyboardInterrupt(), command, False) == ending.STOPPED
    assert "goes on from where it was" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden(tune, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("holdfast.verbs.tune.go", raising(RuntimeError("shape mismatch")))
    code, told = tune()
    assert code == 70 and "RuntimeError: shape mismatch" in told and "fault of Holdfast" in told
    (file,) = (tmp_path / "home" / "crashes").iterdir()
    assert "Traceback" in file.read_text(encoding="utf-8")
