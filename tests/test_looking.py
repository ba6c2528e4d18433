"""Looks during training: they change nothing, the best one's weights are kept, and a killed run ends the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from holdfast.errors import PlanError, RecipeError
from holdfast.hosts.watching import chosen
from holdfast.recipe import load_recipe, recipe_from
from holdfast.runs import looking
from holdfast.runs.job import checked
from holdfast.runs.run import Run
from holdfast.verbs.explain import planned
from holdfast.verbs.tune import tune
from test_run import stop_at
from tiny_run import recipe_data, write_recipe, write_rows

PLAN = [{"LoRA": {"r": 2, "lora_dropout": 0.1}}]


def recipe(world, out: Path, plan=PLAN, data=None, **training):
    mapping = recipe_data(world, out, plan=plan, training=training, data=data or {})
    return load_recipe(write_recipe(out.parent / "recipe.yaml", mapping))


def weights(run: Path):
    return load_file(run / "model" / "adapter_model.safetensors")


def training_of(run: Path):
    return json.loads((run / "training.json").read_text(encoding="utf-8"))


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


@pytest.fixture
def ranked(monkeypatch):
    """ranked(ranks) makes the looks of a run come out so; gives the trainable weights at each."""

    def use(ranks):
        seen = []
        plain = looking._look

        def look(job, model, base):
            _, finding = plain(job, model, base)
            seen.append({n: p.detach().clone() for n, p in job.session.params.items()})
            return ranks[len(seen) - 1], finding

        monkeypatch.setattr(looking, "_look", look)
        return seen

    return use


def test_looking_changes_nothing(world, tmp_path):
    tune(recipe(world, tmp_path / "plain" / "run"))
    tune(recipe(world, tmp_path / "watched" / "run", eval_steps=3))
    one, two = tmp_path / "plain" / "run", tmp_path / "watched" / "run"
    assert same(weights(one), weights(two)) and training_of(one)["loss"] == training_of(two)["loss"]
    looks = training_of(two)["looks"]
    assert [step for step, _ in looks["task"]] == [0, 3, 6] and training_of(two)["best_step"] is None
    assert "Look: task" in (two / "report.html").read_text(encoding="utf-8")


def test_the_best_look_is_exported(world, tmp_path, ranked):
    seen = ranked([0.1, 0.4, 0.9, 0.9, 0.2])
    tune(recipe(world, tmp_path / "run", eval_steps=2, load_best_model_at_end=True))
    assert len(seen) == 5 and training_of(tmp_path / "run")["best_step"] == 4
    mine = sorted(weights(tmp_path / "run").values(), key=lambda t: (t.shape, t.flatten().tolist()))
    best = sorted(seen[2].values(), key=lambda t: (t.shape, t.flatten().tolist()))
    assert len(mine) == len(best) and all(a.equal(b) for a, b in zip(mine, best, strict=True))
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    note = report["task"]["note"]
    assert "also chose the weights" in note and "the weights after step 4 were the best look and came out" in note
    assert "The weights after step 4 were the best look" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_the_last_step_is_looked_at_too(world, tmp_path, ranked):
    """Else a run that looks every fourth of its six steps could not end with what it learnt last."""
    ranked([0.1, 0.4, 0.9])
    tune(recipe(world, tmp_path / "run", eval_steps=4, load_best_model_at_end=True))
    training = training_of(tmp_path / "run")
    assert [step for step, _ in training["looks"]["task"]] == [0, 4, training["steps"]]
    assert training["best_step"] == training["steps"]


def test_a_run_that_ruins_the_task_gives_the_base_back(world, tmp_path, rows):
    """It learns to say one thing, and what is asked of it is another."""
    sets = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", [replace(r, completion=said) for r in rows]))
        for name, said in (("train", " yes"), ("validation", " Zebra 99"))
    }
    ruin = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "eval_steps": 4, "load_best_model_at_end": True}
    tune(recipe(world, tmp_path / "run", data={"metric": "loss", "validation_size": None, **sets}, **ruin))
    training = training_of(tmp_path / "run")
    losses = [v for _, v in training["looks"]["task"]]
    assert losses[0] == min(losses) < losses[-1] and training["best_step"] == 0
    assert all(not w.any() for n, w in weights(tmp_path / "run").items() if "lora_B" in n)
    task = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["task"]
    assert task["before"]["value"] == pytest.approx(task["after"]["value"], rel=1e-5)
    assert "no look was better than the untouched base above the floors, so its weights came out" in task["note"]
    assert "the untouched base above the floors" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_lost_ability_is_out_of_the_question(world, tmp_path, monkeypatch):
    job = planned(recipe(world, tmp_path / "run", eval_steps=4), world.folder)
    kept = {"a": 0.96}
    part = {"name": "in-context"}
    monkeypatch.setattr(looking, "ability", lambda *_: {**part, "retention": {"value": kept["a"]}})
    base = looking._probe(job, job.model)
    rank, finding = looking._look(job, job.model, base)
    assert rank == finding["task"] and finding["kept/in-context"] == 0.96
    kept["a"] = 0.94
    assert looking._look(job, job.model, base)[0] is None
    assert chosen([(0, 0.2, {}), (2, None, {}), (4, 0.3, {}), (6, 0.3, {})]) == 4
    assert chosen([(0, -2.0, {}), (2, None, {}), (4, -1.0, {})]) == 4  # of a loss, ranks are negative


def test_a_run_that_gets_no_better_ends(world, tmp_path, ranked):
    ranked([0.1, 0.4, 0.3, 0.4])
    tune(recipe(world, tmp_path / "run", eval_steps=1, early_stopping_patience=2))
    training = training_of(tmp_path / "run")
    assert training["steps"] == len(training["loss"]) == 3
    assert training["ended"] == "2 looks in a row were no better than that at step 1"
    assert "It ended early: 2 looks" in (tmp_path / "run" / "report.html").read_text("utf-8")
    note = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["task"]["note"]
    assert "its last weights came out, which were no better (training.load_best_model_at_end keeps the best)" in note


def test_the_last_step_of_an_early_end_is_in_the_log(world, tmp_path, ranked):
    """It is the third, and every second is told."""
    ranked([0.1, 0.4, 0.3, 0.4])
    tune(recipe(world, tmp_path / "run", eval_steps=1, early_stopping_patience=2, logging_steps=2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "task" in line] == [2, 3]


@pytest.mark.parametrize("call", [4, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 7, 9))])
def test_a_killed_run_with_looks_ends_the_same(world, tmp_path, call):
    settings = {"eval_steps": 2, "load_best_model_at_end": True, "early_stopping_patience": 3, "learning_rate": 0.05}
    data = {"metric": "loss"}
    for name in ("whole", "killed"):
        one = recipe(world, tmp_path / name / "run", data=data, **settings)
        if name == "killed":
            stop_at(one, "tune", call)
        tune(one)
    one, two = (tmp_path / n / "run" for n in ("whole", "killed"))
    assert same(weights(one), weights(two))
    for key in ("loss", "looks", "best_step", "ended", "steps"):
        assert training_of(one)[key] == training_of(two)[key]


def test_an_epoch_decides_when_to_save(world, tmp_path):
    rows = sum(1 for line in world.train.read_text(encoding="utf-8").splitlines() if line) - 6
    job = planned(recipe(world, tmp_path / "run", save_strategy="epoch"), world.folder)
    assert job.training.save_steps == -(-rows // 4)
    assert planned(recipe(world, tmp_path / "run"), world.folder).training.save_steps == 2


def test_looks_that_see_nothing_are_refused(world, tmp_path):
    for key, value in (("load_best_model_at_end", True), ("early_stopping_patience", 2)):
        with pytest.raises(RecipeError, match="eval_steps beside"):
            recipe_from({"model": {"model_name_or_path": "m"}, "data": {"train": "x"}, "training": {key: value}})
    data = {"test": str(world.train), "validation_size": 0}
    with pytest.raises(RecipeError, match="there are none"):
        planned(recipe(world, tmp_path / "run", data=data, eval_steps=2), world.folder)
    with pytest.raises(RecipeError, match="looks every 500 steps, and the run has"):
        planned(recipe(world, tmp_path / "run", eval_steps=500), world.folder)
    with pytest.raises(PlanError, match="ProMoT splits it into stages"):
        planned(recipe(world, tmp_path / "run", [{"ProMoT": {"num_virtual_tokens": 2}}], eval_steps=2), world.folder)
    for method in ("MovingAverage", "AdaptiveEMA"):
        best = {"eval_steps": 2, "load_best_model_at_end": True}
        with pytest.raises(PlanError, match=f"best look, but {method} ends with an average along training"):
            planned(recipe(world, tmp_path / "run", [{method: {}}], **best), world.folder)


def test_a_probe_of_another_version_is_asked_again(world, tmp_path):
    """Else the base as one version answered it would be held against looks of another."""
    folder = tune(recipe(world, tmp_path / "run", eval_steps=2))
    known = json.loads((folder / looking.PROBE).read_text())
    job = checked(Run(recipe(world, tmp_path / "run", eval_steps=2), world.folder))
    assert looking._base(job) == known["abilities"]
    for old in ({"made": ["torch 1.0"], "abilities": []}, []):
        (folder / looking.PROBE).write_text(json.dumps(old))
        assert looking._base(job) == known["abilities"]
        assert json.loads((folder / looking.PROBE).read_text()) == known


def test_the_probe_is_work_of_its_recipe(world, tmp_path):
    assert "probe.json" in Run(recipe(world, tmp_path / "run"), world.folder).folder.work


@pytest.mark.parametrize("plan", [[], [{"S2FT": {}}], [{"LocFT": {}}], [{"BottleneckAdapter": {}}]])
@pytest.mark.parametrize("training", [{"eval_steps": 3}, {"learning_rate": "search"}])
def test_looks_and_rate_trials_in_bfloat16(world, tmp_path, plan, training):
    """What trains is fp32 then, and the rest is not: they are asked as steps compute."""
    one = recipe(world, tmp_path / "run", plan, **training)
    tune(one.model_copy(update={"model": one.model.model_copy(update={"dtype": "bfloat16"})}))
    assert (tmp_path / "run" / "report.json").is_file()
