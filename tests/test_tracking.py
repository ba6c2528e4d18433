"""Trackers of a run: what they are told, read back from their files; nothing leaves the machine."""

import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from holdfast.errors import RecipeError
from holdfast.hosts.plain import Log
from holdfast.recipe import load_recipe
from holdfast.runs import checks, looking, tracking
from holdfast.runs.tracking import Trackers, at_home
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe

PLAN = [{"LoRA": {"r": 2}}, {"ICLAnchor": {"pool": 4, "every": 1}}]
needs = {name: pytest.mark.skipif(not find_spec(name), reason=name) for name in ("tensorboard", "wandb", "mlflow")}


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """The variables of trackers unset, and put back afterwards."""
    for key in at_home(tmp_path):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


def recipe(world, out: Path, trackers, **training):
    settings = {"report_to": trackers, "logging_steps": 2, **training}
    path = write_recipe(out.parent / "recipe.yaml", recipe_data(world, out, plan=PLAN, training=settings))
    return load_recipe(path)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@needs["tensorboard"]
@pytest.mark.parametrize("named", [{}, {"run_name": "mine"}])
def test_tensorboard_reads_what_the_run_did(world, tmp_path, clean, named):
    tune(recipe(world, tmp_path / "run", "tensorboard", **named))
    told = scalars(tmp_path / "run" / "trackers" / named.get("run_name", "run"))
    names = ("loss", "ICLAnchor", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb")
    assert {f"train/{n}" for n in names} == set(told)
    training = json.loads((tmp_path / "run" / "training.json").read_text(encoding="utf-8"))
    for tag, kept in (("train/loss", training["loss"]), ("train/ICLAnchor", training["terms"]["ICLAnchor"])):
        every = [(step + 1, value) for step, value in kept if (step + 1) % 2 == 0]
        assert [s for s, _ in told[tag]] == [s for s, _ in every]
        assert [v for _, v in told[tag]] == pytest.approx([v for _, v in every], rel=1e-5)
    rates = [v for _, v in told["train/learning_rate"]]  # linear from 0.01 over 8 steps, one of warm-up
    assert rates == pytest.approx([0.01 * (8 - s) / 7 for s in (1, 3, 5, 7)], rel=1e-5)
    assert all(v > 0 for tag in ("grad_norm", "tokens_per_second", "memory_gb") for _, v in told[f"train/{tag}"])


@needs["tensorboard"]
def test_looks_are_told_too(world, tmp_path, clean):
    tune(recipe(world, tmp_path / "run", ["tensorboard"], eval_steps=4))
    looks = json.loads((tmp_path / "run" / "training.json").read_text(encoding="utf-8"))["looks"]
    told = scalars(tmp_path / "run" / "trackers" / "run")
    assert [s for s, _ in told["eval/task"]] == [0, 4, 8]
    assert [v for _, v in told["eval/task"]] == pytest.approx([v for _, v in looks["task"]], rel=1e-5)


@needs["tensorboard"]
def test_the_weights_are_those_of_a_run_without(world, tmp_path, clean):
    for name in ("none", "tensorboard"):
        tune(recipe(world, tmp_path / name / "run", name))
    one, two = (tmp_path / n / "run" / "model" / "adapter_model.safetensors" for n in ("none", "tensorboard"))
    assert one.read_bytes() == two.read_bytes()
    assert not (tmp_path / "none" / "run" / "trackers").exists()


class Recorder:
    """Stands for a tracker that is not installed; accelerate's have the same four methods."""

    def __init__(self):
        self.told: list[tuple[int, dict[str, float]]] = []
        self.settings, self.finished = {}, False

    def start(self):
        pass

    def store_init_configuration(self, settings):
        self.settings = settings

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.finished = True


def test_every_tracker_hears_steps_looks_and_what_is_kept(world, tmp_path, clean, monkeypatch):
    """The tiny model learns nothing from a prompt, so the base's answers and the looked at ones are planted."""
    recorder, looks = Recorder(), iter([20, 20, 15, 10])
    about = {"name": "t", "chance": 0.0, "metric": "right", "clustered": False, "version": 1}

    def probe(job, model):
        right = next(looks)
        items = [{"id": str(n), "cluster": "", "correct": float(n < right), "marks": {}} for n in range(24)]
        return [{"suite": "in-context", "tasks": [{**about, "items": items}]}]

    monkeypatch.setattr(looking, "_probe", probe)
    monkeypatch.setattr(tracking, "_made", lambda *_: recorder)
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    tune(recipe(world, tmp_path / "run", ["trackio"], eval_steps=4))
    seen = {step: values for step, values in recorder.told if "eval/task" in values}
    assert [values["eval/kept/in-context"] for values in seen.values()] == pytest.approx([1.0, 0.75, 0.5])
    assert list(seen) == [0, 4, 8] and recorder.finished and recorder.settings["training.max_steps"] == 8
    steps = {step: values for step, values in recorder.told if "train/loss" in values}
    names = ("loss", "ICLAnchor", "learning_rate", "grad_norm", "memory_gb")
    assert list(steps) == [2, 4, 6, 8] and all(f"train/{n}" in v for v in steps.values() for n in names)
    assert all(values["train/tokens_per_second"] > 0 for values in list(steps.values())[1:])


@needs["wandb"]
def test_wandb_stays_offline(world, tmp_path, clean):
    tune(recipe(world, tmp_path / "run", ["wandb"], max_steps=2))
    assert os.environ["WANDB_MODE"] == "offline"
    assert list((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))


@needs["mlflow"]
def test_mlflow_stays_in_the_folder(world, tmp_path, clean):
    import mlflow

    tune(recipe(world, tmp_path / "run", ["mlflow"]))
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    found = mlflow.search_runs(experiment_names=["run"], output_format="list")
    assert str(tmp_path) in os.environ["MLFLOW_TRACKING_URI"] and found[0].data.metrics["train/loss"] > 0
    assert found[0].data.params["training.max_steps"] == "8"


class Broken:
    def log(self, values, step):
        raise OSError("disk full")

    def finish(self):
        raise AssertionError("it was dropped")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path):
    trackers = Trackers(["wandb"], tmp_path, {})
    trackers._open = {"wandb": Broken()}
    with pytest.warns(UserWarning, match=r"The tracker wandb failed \(disk full\); the run goes on"):
        trackers.step(1, {"task": 1.0}, Log(norm=torch.tensor(2.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.step(2, {"task": 1.0}, Log())
        trackers.finish()


def test_settings_are_flat_and_plain():
    assert tracking._flat({"a": {"b": 1, "c": [1, "x"], "d": None}, "e": "t"}) == {
        "a.b": 1, "a.c": "[1, 'x']", "a.d": "None", "e": "t",
    }  # fmt: skip


def test_what_the_user_set_stays(clean, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(tracking, "_made", lambda *a: (_ for _ in ()).throw(OSError("stop here")))
    with pytest.warns(UserWarning, match="stop here"):
        Trackers(["wandb"], tmp_path, {}).tell(1, {"x": 1.0})
    assert os.environ["WANDB_MODE"] == "online"


def test_a_tracker_that_is_missing_is_missed_at_once(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "trackio" else find_spec(name))
    with pytest.raises(RecipeError, match="report_to names trackio, and it is not installed") as told:
        tune(recipe(world, tmp_path / "run", ["trackio"]))
    assert "pip install trackio" in told.value.cure and 'holdfast-lm[trackers]"' in told.value.cure
    assert checks.check_trackers is tracking.check_trackers and not (tmp_path / "run" / "before.json").exists()
