"""The flow end to end: files, exports, starting again, going on after a kill, and what is computed once."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from holdfast.errors import ModelError, PlanError, RecipeError, TrainingError
from holdfast.measure.compare import ability
from holdfast.recipe import load_recipe, recipe_from
from holdfast.report.examples import examples
from holdfast.runs import export, handover, measuring, training
from holdfast.runs.run import Run
from holdfast.verbs.explain import planned
from holdfast.verbs.tune import go, tune
from tiny_run import make_world, recipe_data, write_recipe, write_rows

LORA = [{"LoRA": {"r": 2, "lora_dropout": 0.1}}, {"ICLAnchor": {"pool": 4, "every": 1}}]
PROMOT = [{"ProMoT": {"num_virtual_tokens": 3}}]
PLANS = {"dense": [], "lora": LORA, "promot": PROMOT, "promot + lora": [*PROMOT, {"LoRA": {"r": 2}}]}
FILES = ("recipe.yaml", "inputs.json", "plan.json", "before.json", "training.json", "after.json", "report.json",
         "report.html", "report.md", "model/README.md")  # fmt: skip
RESULT = ("steps", "loss", "terms", "tokens", "realised_mix")  # of training.json, without the times


class Kept(Run):
    """A run that remembers the tuned model in memory."""

    def go(self):
        def measured(job, when, model, soft_prompt=None, plain=measuring.measured):
            self.tuned, self.soft = model, soft_prompt
            return plain(job, when, model, soft_prompt)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measuring, "measured", measured)
            go(self)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """whole(plan) is the finished run of that plan, made once: (run, folder)."""
    done = {}

    def run_of(name: str) -> Kept:
        if name not in done:
            out = tmp_path_factory.mktemp("whole") / "run"
            run = Kept(recipe(world, out, plan=PLANS[name]), world.folder)
            run.go()
            done[name] = run
        return done[name]

    return run_of


def recipe(world, out: Path, **changes):
    return load_recipe(write_recipe(out.parent / "recipe.yaml", recipe_data(world, out, **changes)))


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


# ---- what a run leaves


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_leaves_everything(whole, plan):
    folder = whole(plan).path
    missing = [name for name in FILES if not (folder / name).is_file()]
    assert missing == []
    assert not [p for p in folder.iterdir() if p.name.startswith("checkpoint") or p.suffix == ".new"]
    report = load(folder / "report.json")
    assert report["verdict"]["status"] == "not checked"  # a random model has no ability to lose
    assert report["verdict"]["sentence"]
    assert [row["method"] for row in report["plan"]] == [next(iter(m)) for m in PLANS[plan]]
    assert report["task"]["before"]["n"] == report["task"]["after"]["n"] == 6
    assert report["task"]["split"] == "validation" and "validation" in report["task"]["note"]
    training = load(folder / "training.json")
    assert training["steps"] == len(training["loss"]) == 8
    assert training["realised_mix"]["task"]["examples"] == 8 * 4
    assert load_recipe(folder / "recipe.yaml") == whole(plan).recipe


def test_what_became_of_each_row_is_in_the_folder(world, tmp_path):
    tune(recipe(world, tmp_path / "run", plan=[{"CLEAR": {"samples": 1, "max_new_tokens": 2, "rows": 5}}]))
    said, left = load(tmp_path / "run" / "verdicts.json")["CLEAR"], load(tmp_path / "run" / "training.json")
    assert len(said) == len({v["key"] for v in said}) == 5 and {v["verdict"] for v in said} == {"kept", "left out"}
    gone = sum(v["verdict"] == "left out" for v in said)
    assert f"CLEAR leaves out {gone} of 5 rows" in " ".join(left["notes"])
    assert {v["verdict"] == "kept" for v in said if v["confidence"] == max(w["confidence"] for w in said)} == {True}


def test_the_card_has_front_matter(whole):
    text = (whole("lora").path / "model" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "peft"
    assert card["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    assert "## Before and after" in body and "## Recipe" in body
    dense = (whole("dense").path / "model" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(dense.split("---\n", 2)[1])["library_name"] == "transformers"


def test_training_learns(whole):
    loss = [value for _, value in load(whole("dense").path / "training.json")["loss"]]
    assert loss[-1] < loss[0] - 0.5


# ---- the export, loaded without Holdfast


@pytest.mark.parametrize("plan", PLANS)
def test_the_export_is_the_tuned_model(whole, world, plan):
    run = whole(plan)
    name = run.path / "model"
    if "lora" in plan:
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), name)
    else:
        plain = AutoModelForCausalLM.from_pretrained(name)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(logits(plain, input_ids=ids), logits(run.tuned, input_ids=ids))
    base = AutoModelForCausalLM.from_pretrained(world.base)
    assert not torch.allclose(logits(base, input_ids=ids), logits(plain, input_ids=ids), atol=1e-3)


def test_the_exported_prompt_gives_the_task_model(whole):
    run = whole("promot")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.path / "model"), run.path / "prompt")
    ids = torch.arange(5, 25)[None]
    soft = run.soft[None]
    embedded = torch.cat([soft, run.tuned.get_input_embeddings()(ids)], dim=1)
    expected = logits(run.tuned, inputs_embeds=embedded)
    torch.testing.assert_close(logits(plain, input_ids=ids), expected, atol=1e-6, rtol=1e-5)
    bare = logits(run.tuned, input_ids=ids)
    assert not torch.allclose(expected[:, soft.shape[1] :], bare, atol=1e-3)


def test_export_merged_and_elsewhere(world, tmp_path):
    run = Kept(
        recipe(world, tmp_path / "run", export={"merge": True, "folder": str(tmp_path / "out")}),
        world.folder,
    )
    run.go()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(logits(plain, input_ids=ids), logits(run.tuned, input_ids=ids))
    assert (tmp_path / "out" / "README.md").is_file()
    assert not (tmp_path / "run" / "model").exists()
    assert load(tmp_path / "run" / "report.json")["tuned"]["path"] == str(tmp_path / "out")


def test_a_run_in_bfloat16(world, tmp_path):
    run = Kept(recipe(world, tmp_path / "run", plan=[], model={"dtype": "bfloat16"}), world.folder)
    run.go()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert plain.dtype == torch.bfloat16
    mine = dict(run.tuned.named_parameters())
    assert all(torch.equal(p, mine[name]) for name, p in plain.named_parameters())
    assert load(tmp_path / "run" / "report.json")["model"]["dtype"] == "bfloat16"


# ---- what the card says


def by_the_card(folder: Path, monkeypatch):
    """What the code of a card gives, run in its folder: every name it sets."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.split("## Use\n\n```python\n", 1)[1].split("\n```", 1)[0]
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(code, "card", "exec"), names)
    return names


@pytest.mark.parametrize("plan", PLANS)
def test_the_code_of_the_card_loads_the_tuned_model(whole, monkeypatch, plan):
    run = whole(plan)
    found, ids = by_the_card(run.path / "model", monkeypatch), torch.arange(5, 25)[None]
    assert torch.equal(logits(found["model"], input_ids=ids), logits(run.tuned, input_ids=ids))
    assert found["tokenizer"]("a b").input_ids
    assert ("task_model" in found) == ("promot" in plan)
    if "promot" in plan:
        embedded = torch.cat([run.soft[None], run.tuned.get_input_embeddings()(ids)], dim=1)
        want = logits(run.tuned, inputs_embeds=embedded)
        torch.testing.assert_close(logits(found["task_model"], input_ids=ids), want, atol=1e-6, rtol=1e-5)


def test_every_export_is_checked_and_says_so(whole):
    for plan in PLANS:
        report = load(whole(plan).path / "report.json")
        assert report["tuned"]["export"] == "loaded the way its card says, its logits equal the trained model's"
        assert report["timing"]["export check"] > 0
        assert "the way its card says" in (whole(plan).path / "report.html").read_text(encoding="utf-8")


def spoil(patch, damage):
    """From now on exports are damaged on the way to the disk."""

    def save(job, tuned, soft, plain=export.save):
        plain(job, tuned, soft)
        if damage == "no folder":
            shutil.rmtree(job.run.export)
            return
        from safetensors.torch import load_file, save_file

        folder = job.run.path / "prompt" if damage == "prompt" else job.run.export
        (file,) = folder.glob("*.safetensors")
        state = load_file(file)
        first = next(n for n in state if "lora_B" in n or "embed" in n)
        save_file({**state, first: state[first] * 1.01 + 0.01}, file, metadata={"format": "pt"})

    patch.setattr(export, "save", save)


@pytest.mark.parametrize(
    ("plan", "damage", "match"),
    [
        ("lora", "weights", "The model exported to .* computes something else"),
        ("dense", "weights", "The model exported to .* computes something else"),
        ("promot", "prompt", "The soft prompt exported to .* computes something else"),
        ("lora", "no folder", "cannot be loaded the way its card says"),
    ],
)
def test_a_wrong_export_ends_the_run_loudly(whole, world, tmp_path, monkeypatch, plan, damage, match):
    one = recipe(world, tmp_path / "run", plan=PLANS[plan])
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=match):
        spoil(patch, damage)
        tune(one)
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert "checkpoint" in left and not left & {"training.json", "after.json", "report.json"}
    tune(one)
    assert_same_end(tmp_path / "run", whole(plan).path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    "target", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join
)
def test_adapters_on_a_tied_weight_are_exported_as_trained(world, tmp_path, target, merge, monkeypatch):
    one = recipe(world, tmp_path / "run", plan=[{"LoRA": {"r": 2, "target_modules": target}}], export={"merge": merge})
    run = Kept(one, world.folder)
    run.go()
    found, ids = by_the_card(tmp_path / "run" / "model", monkeypatch), torch.arange(5, 25)[None]
    assert torch.equal(logits(found["model"], input_ids=ids), logits(run.tuned, input_ids=ids))
    base = AutoModelForCausalLM.from_pretrained(world.base)
    assert not torch.allclose(logits(base, input_ids=ids), logits(found["model"], input_ids=ids), atol=1e-3)
    assert found["model"].config.tie_word_embeddings is not merge


def test_there_may_be_no_room_for_a_second_copy(world, tmp_path, monkeypatch):
    from holdfast.models import exported

    monkeypatch.setattr(exported, "free_memory", lambda: 1000.0)
    tune(recipe(world, tmp_path / "run", training={"max_steps": 1}))
    assert load(tmp_path / "run" / "report.json")["tuned"]["export"].startswith("not checked: there is no room")


# ---- tuning on top of an adapter


@pytest.fixture(scope="module")
def stack(world, whole, tmp_path_factory):
    """Runs on top of the finished run "lora", each on the one before: (folder, run)."""
    place, below, runs = tmp_path_factory.mktemp("stack"), whole("lora").path / "model", []
    for name, plan in (("second", LORA), ("third", PLANS["promot + lora"])):
        model = {"model_name_or_path": str(below)}
        run = Kept(recipe(world, place / name / "run", plan=plan, model=model), world.folder)
        run.go()
        runs.append(run)
        below = run.export
    return runs


@pytest.mark.parametrize("which", [0, 1], ids=["on an adapter", "on an adapter on an adapter"])
def test_an_adapter_on_an_adapter_brings_its_base(stack, world, monkeypatch, which):
    run = stack[which]
    config = load(run.export / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(run.path / "base") and config["revision"] is None
    ids = torch.arange(5, 25)[None]
    plain = AutoPeftModelForCausalLM.from_pretrained(run.export)
    assert torch.equal(logits(plain, input_ids=ids), logits(run.tuned, input_ids=ids))
    bare = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), run.export)
    assert not torch.allclose(logits(bare, input_ids=ids), logits(plain, input_ids=ids), atol=1e-2)
    found = by_the_card(run.export, monkeypatch)
    assert torch.equal(logits(found["model"], input_ids=ids), logits(run.tuned, input_ids=ids))
    assert "in the folder base of the run" in (run.export / "README.md").read_text(encoding="utf-8")


def test_a_finished_run_on_an_adapter_does_nothing(stack):
    before = {p: p.stat().st_mtime_ns for p in stack[0].path.rglob("*")}
    told = []
    tune(stack[0].recipe, tell=lambda *args: told.append(args[0]))
    assert told == ["done"] and {p: p.stat().st_mtime_ns for p in stack[0].path.rglob("*")} == before


@pytest.mark.parametrize(("phase", "call"), [("prepare", 1), ("tune", 5), ("measure after", 1)])
def test_a_killed_run_on_an_adapter_goes_on(stack, world, whole, tmp_path, phase, call):
    model = {"model_name_or_path": str(whole("lora").path / "model")}
    one = recipe(world, tmp_path / "run", plan=LORA, model=model)
    stop_at(one, phase, call)
    tune(one)
    assert_same_end(tmp_path / "run", stack[0].path)
    config = load(tmp_path / "run" / "model" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(tmp_path / "run" / "base")


@pytest.mark.parametrize(("plan", "merge"), [("dense", False), ("lora", True)])
def test_a_whole_model_needs_no_base_beside_it(world, whole, tmp_path, plan, merge):
    model = {"model_name_or_path": str(whole("lora").path / "model")}
    one = recipe(world, tmp_path / "run", plan=PLANS[plan], model=model, export={"merge": merge})
    run = Kept(one, world.folder)
    run.go()
    assert not (run.path / "base").exists()
    plain, ids = AutoModelForCausalLM.from_pretrained(run.export), torch.arange(5, 25)[None]
    assert torch.equal(logits(plain, input_ids=ids), logits(run.tuned, input_ids=ids))


# ---- started again


def test_a_finished_run_does_nothing(whole, world):
    run = whole("lora")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.path.rglob("*") if p.is_file()}
    told = []
    assert tune(run.path / "recipe.yaml", tell=lambda *args: told.append(args)) == run.path
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.path.rglob("*") if p.is_file()}
    assert after == before
    assert [phase for phase, _, _ in told] == ["done"]
    assert "is finished" in told[0][2]


def test_a_recipe_in_python_finds_its_own_run(world, tmp_path):
    data = recipe_data(world, tmp_path / "run")
    tune(recipe_from(data))
    told = []
    tune(recipe_from(data), tell=lambda *args: told.append(args[0]))
    assert told == ["done"]


def test_a_folder_is_for_one_recipe(whole, world):
    run = whole("lora")
    other = recipe(world, run.path, plan=LORA, training={"seed": 5})
    with pytest.raises(RecipeError, match="another recipe") as caught:
        tune(other)
    assert "output_dir" in caught.value.cure


def test_a_mended_recipe_may_use_the_folder(world, tmp_path):
    wrong = recipe(world, tmp_path / "run", data={"max_length": 4})
    with pytest.raises(ValueError, match="max_length"):
        tune(wrong)
    tune(recipe(world, tmp_path / "run", training={"max_steps": 1}))
    assert (tmp_path / "run" / "report.json").is_file()


@pytest.mark.parametrize("what", ["data", "model"])
def test_what_changed_under_a_run_is_noticed(world, tmp_path, what, rows, tiny_model, tokenizer):
    here = make_world(tmp_path, tiny_model(), tokenizer, rows)
    stop_at(recipe(here, tmp_path / "run"), "tune", 1)
    if what == "data":
        write_rows(here.train, rows[:-1])
    else:
        make_world(tmp_path, tiny_model(layers=1), tokenizer, rows)
    with pytest.raises(RecipeError, match=f"The {what} of this recipe is no longer"):
        tune(load_recipe(tmp_path / "recipe.yaml"))


# ---- killed and started again


class Killed(BaseException):
    """As sudden as Ctrl-C."""


def stop_at(recipe, phase: str, call: int) -> None:
    """Run until the `call`-th word (1: first) from `phase`, then die there."""
    seen = []

    def tell(name, share, words):
        if name == phase:
            seen.append(share)
            if len(seen) == call:
                raise Killed

    with pytest.raises(Killed):
        tune(recipe, tell=tell)


KILLS = [
    ("lora", "load", 1),
    ("lora", "measure before", 1),
    ("lora", "measure before", 3),
    ("lora", "prepare", 1),
    ("lora", "tune", 1),
    ("lora", "tune", 5),
    ("lora", "measure after", 1),
    ("lora", "done", 1),
    ("dense", "tune", 7),
    ("promot", "tune", 3),  # in the stage of the prompt
    ("promot", "tune", 4),  # just before the boundary of the stages
    ("promot", "tune", 7),  # in the stage of the model
    ("promot + lora", "tune", 7),
    ("promot", "measure after", 1),
]


@pytest.mark.parametrize(("plan", "phase", "call"), KILLS)
def test_a_killed_run_goes_on_to_the_same_end(whole, world, tmp_path, monkeypatch, plan, phase, call):
    if phase == "measure before":
        monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))  # or all of it is in the cache
    one = recipe(world, tmp_path / "run", plan=PLANS[plan])
    stop_at(one, phase, call)
    started = []
    tune(one, tell=lambda *args: started.append(args))
    if phase == "tune" and call > 2:  # it did go on, and did not begin anew
        assert min(share for name, share, _ in started if name == "tune") > 2 / 8
    assert_same_end(tmp_path / "run", whole(plan).path)


def assert_same_end(folder: Path, other: Path) -> None:
    mine, yours = load(folder / "training.json"), load(other / "training.json")
    assert {k: mine[k] for k in RESULT} == {k: yours[k] for k in RESULT}
    for name in ("before.json", "after.json"):
        assert load(folder / name) == load(other / name)
    assert not (folder / "checkpoint").exists()


def test_a_killed_run_on_streamed_sets_reads_the_same_rows(world, tmp_path, monkeypatch):
    """Two sets in their shares, one of them streamed; the second start has nothing on disk to find."""
    sets = [{"path": str(world.train), "weight": 1, "alias": "a"},
            {"path": str(world.train), "weight": 2, "alias": "b", "streaming": True}]  # fmt: skip
    one, other = (recipe(world, tmp_path / name, plan=LORA, data={"train": sets}) for name in ("run", "other"))
    tune(other)
    stop_at(one, "tune", 5)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    tune(one)
    assert_same_end(tmp_path / "run", tmp_path / "other")


def test_killed_between_two_checkpoints(whole, world, tmp_path):
    one = recipe(world, tmp_path / "run", plan=LORA)
    stop_at(one, "tune", 5)
    os.replace(tmp_path / "run" / "checkpoint", tmp_path / "run" / "checkpoint.old")  # between the two renames
    tune(one)
    assert_same_end(tmp_path / "run", whole("lora").path)


def test_killed_after_the_export(whole, world, tmp_path):
    one = recipe(world, tmp_path / "run", plan=PROMOT)
    stop_at(one, "measure after", 1)
    (tmp_path / "run" / "training.json").unlink()  # as if it had died just before
    tune(one)
    assert_same_end(tmp_path / "run", whole("promot").path)


def test_an_export_that_another_run_has_overwritten_is_not_reported(world, tmp_path):
    """Two runs with one export.folder: the first, stopped before it was measured, must not report on the second's."""
    runs = [recipe(world, tmp_path / name, export={"folder": str(tmp_path / "model")}) for name in ("a", "b")]
    stop_at(runs[0], "measure after", 1)
    other = runs[1].training.model_copy(update={"seed": 7})
    tune(runs[1].model_copy(update={"training": other}))
    with pytest.raises(TrainingError, match=r"holds another model than the run in .* has written there"):
        tune(runs[0])
    assert not (tmp_path / "a" / "report.json").exists()
    with pytest.raises(TrainingError, match=r"holds another model"):  # nor handed on
        asked = runs[0].export.model_copy(update={"push_to_hub": "me/mine"})
        handover.hand_over(Run(runs[0].model_copy(update={"export": asked}), world.folder))


# ---- computed once


def count_forwards(recipe) -> dict[str, int]:
    """Forwards of the language model by phase."""
    phase, count = ["start"], {}

    def hook(module, *_):
        if type(module).__name__ == "LlamaForCausalLM":
            count[phase[0]] = count.get(phase[0], 0) + 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        tune(recipe, tell=lambda name, *_: phase.__setitem__(0, name))
    finally:
        handle.remove()
    return count


def test_what_another_machine_measured_is_not_mixed_with_ours(world, tmp_path):
    """A run that was begun elsewhere measures its base anew: other versions and precisions round otherwise."""
    job = planned(recipe(world, tmp_path / "run"), world.folder)
    job.run.path.mkdir(parents=True)
    first = measuring.measured(job, "before", job.model)
    file = tmp_path / "run" / "before.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "task": [], "made": [*told["made"][:-1], "torch.float16"]}))
    assert measuring.measured(job, "before", job.model) == first
    file.write_text(json.dumps({k: v for k, v in told.items() if k != "made"} | {"task": []}))  # of an older version
    assert measuring.measured(job, "before", job.model) == first
    file.write_text(json.dumps({**told, "task": []}))
    assert measuring.measured(job, "before", job.model)["task"] == []  # ours, as it lies there


def test_a_file_that_a_method_reads_is_an_input(world, tmp_path):
    """A killed run goes on only with the rows that it began with."""
    rows = [{"prompt": f"Say {n}.", "completion": f" {n}"} for n in range(12)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plan = [{"LoRA": {"r": 2}}, {"Replay": {"share": 0.3, "sources": [str(file)]}}]
    begun = planned(recipe(world, tmp_path / "run", plan=plan), world.folder).inputs()
    file.write_text("".join(json.dumps(r) + "\n" for r in rows[1:]))
    changed = planned(recipe(world, tmp_path / "run", plan=plan), world.folder).inputs()
    assert [k for k in begun if begun[k] != changed[k]] == [f"file {file} of Replay"]


def test_half_precision_without_scaled_losses_is_refused(world, tmp_path):
    with pytest.raises(RecipeError, match=r"model\.dtype is float16, and training in it needs its losses scaled"):
        planned(recipe(world, tmp_path / "run", model={"dtype": "float16"}), world.folder)


def test_the_base_is_measured_once(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    first = count_forwards(recipe(world, tmp_path / "one"))
    moved = shutil.copytree(world.base, tmp_path / "same weights elsewhere")
    second = count_forwards(
        recipe(world, tmp_path / "two", model={"model_name_or_path": str(moved)}, training={"learning_rate": 0.02})
    )
    assert first["measure before"] > 0
    assert "measure before" not in second
    assert second["measure after"] > 0
    assert load(tmp_path / "one" / "before.json") == load(tmp_path / "two" / "before.json")
    other = count_forwards(recipe(world, tmp_path / "three", measure={"limit": 3}))
    assert other["measure before"] > 0  # other questions are asked anew


def test_a_damaged_cache_is_made_anew(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    tune(recipe(world, tmp_path / "one"))
    for file in (tmp_path / "home" / "measurements").iterdir():
        file.write_text("{")
    tune(recipe(world, tmp_path / "two"))
    assert load(tmp_path / "one" / "before.json") == load(tmp_path / "two" / "before.json")


# ---- settings that must not be skipped


def test_gradient_checkpointing_changes_memory_only(whole, world, tmp_path, monkeypatch):
    used = []
    one = recipe(world, tmp_path / "run", plan=PLANS["dense"], training={"gradient_checkpointing": True})

    def watched(job, plain=training.trained):
        out = plain(job)
        used.append(job.model.is_gradient_checkpointing)
        return out

    monkeypatch.setattr(training, "trained", watched)
    tune(one)
    assert used == [True]
    mine, plain = (load(f / "training.json")["loss"] for f in (tmp_path / "run", whole("dense").path))
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(plain), atol=2e-4, rtol=0)


def test_the_data_seed_orders_the_rows(world, tmp_path):
    losses = []
    for n, seed in enumerate((None, 0, 7)):
        tune(recipe(world, tmp_path / str(n), training={"data_seed": seed, "max_steps": 2}))
        losses.append(load(tmp_path / str(n) / "training.json")["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_without_a_measurement_before(world, tmp_path):
    tune(recipe(world, tmp_path / "run", measure={"skip_before": True}))
    assert not (tmp_path / "run" / "before.json").exists()
    report = load(tmp_path / "run" / "report.json")
    assert report["task"]["before"] is None and report["task"]["after"]["n"] == 6
    assert report["verdict"]["status"] == "not checked"
    for task in report["abilities"][0]["tasks"]:
        assert task["before"] is None and task["after"]["n"] == 2


def test_two_suites_and_one_floor(world, tmp_path):
    seen = []
    one = recipe(world, tmp_path / "run", measure={"suites": ["in-context", "anchors"], "keep": {"anchors": 0.9}})
    tune(one, tell=lambda phase, share, _: seen.append((phase, share)))
    floors = {a["name"]: a["margin"] for a in load(tmp_path / "run" / "report.json")["abilities"]}
    assert floors == pytest.approx({"in-context": 0.03, "anchors": 0.1})
    for when in ("measure before", "measure after"):
        shares = [share for phase, share in seen if phase == when]
        assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1  # a bar never goes back


def test_free_text_can_be_scored_by_exact_match(world, tmp_path, rows):
    few = write_rows(tmp_path / "few.jsonl", rows[:8])
    data = {"train": str(few), "validation_size": 3, "metric": "exact_match"}
    tune(recipe(world, tmp_path / "run", data=data))
    report = load(tmp_path / "run" / "report.json")
    assert report["task"]["metric"] == "exact match" and report["task"]["chance"] == 0
    assert report["task"]["after"]["n"] == 3


def test_plain_text_can_be_tuned_on(world, tmp_path):
    texts = [json.dumps({"text": f"Ticket {n}: please help me."}) for n in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    data = {"train": str(tmp_path / "text.jsonl"), "prompt": None, "completion": None, "validation_size": 3}
    tune(recipe(world, tmp_path / "run", data=data))
    assert load(tmp_path / "run" / "report.json")["task"]["after"]["n"] == 3


def test_a_stage_needs_a_step(world, tmp_path):
    with pytest.raises(PlanError, match="ProMoT splits the run into 2 stages, but the run has 1 step"):
        tune(recipe(world, tmp_path / "run", plan=PROMOT, training={"max_steps": 1}))


def test_explaining_writes_nothing(world, tmp_path):
    one = recipe(world, tmp_path / "run", plan=LORA)
    before = sorted(tmp_path.rglob("*"))
    job = planned(one, world.folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert job.session.plan.names == ("LoRA", "ICLAnchor") and job.training.num_steps == 8


# ---- the examples of a report


def test_examples_show_what_broke(world, tmp_path, whole, tokenizer):
    run = whole("dense")
    before, after = load(run.path / "before.json"), load(run.path / "after.json")
    task = before["abilities"][0]["tasks"][3]
    task["items"][1]["correct"], after["abilities"][0]["tasks"][3]["items"][1]["correct"] = 1, 0
    (shown,) = examples(lambda: run.tuned, tokenizer, before["abilities"], after["abilities"])
    assert shown["task"] == task["name"]
    assert shown["prompt"].strip() and shown["expected"] == shown["before"] != ""
    assert shown["after"] != shown["expected"] and "\n" not in shown["after"]
    assert examples(lambda: run.tuned, tokenizer, before["abilities"], before["abilities"]) == []


def test_a_measured_model_against_itself_is_never_lost(whole):
    for part in load(whole("dense").path / "before.json")["abilities"]:
        for n, item in enumerate(i for t in part["tasks"] for i in t["items"]):
            item["correct"] = int(n % 5 > 0)  # as if the model could do something
        told = ability(part, part, 0.95)
        assert told["status"] in ("kept", "unclear")
        assert told["difference"]["value"] == 0 and told["retention"]["value"] == 1


# ---- what the export needs is looked at before


@pytest.mark.parametrize("what", ["configuration", "tokenizer"])
def test_what_cannot_be_saved_is_told_before_any_training(world, tmp_path, monkeypatch, what):
    from transformers import LlamaConfig, PreTrainedTokenizerBase

    def fail(*_args, **_options):
        raise TypeError("Object of type set is not JSON serializable")

    kind = LlamaConfig if what == "configuration" else PreTrainedTokenizerBase
    monkeypatch.setattr(kind, "save_pretrained", fail)
    with pytest.raises(ModelError, match=f"The {what} of .* cannot be saved .TypeError: Object of type set"):
        tune(recipe(world, tmp_path / "run"))
    assert not (tmp_path / "run" / "before.json").exists()
