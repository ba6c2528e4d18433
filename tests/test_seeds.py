"""tune --seeds: one run a seed on the same rows, and a verdict about the recipe."""

import dataclasses
import json
import shutil
import sys

import pytest

from holdfast import cli
from holdfast.errors import HoldfastError, RecipeError
from holdfast.recipe import recipe_from
from holdfast.runs import seeds, settle
from holdfast.runs.run import silent
from holdfast.verbs import tune as verb
from tiny_run import recipe_data, write_recipe

SEEDS = 3


def asked(world, out, **changes):
    measure = {"suites": ["language"], "limit": 6, "num_fewshot": 0, "keep": {"language": 0.9}}
    training = {"max_steps": 4, "learning_rate": 0.003}
    return recipe_from(recipe_data(world, out, measure={**measure, **changes}, training=training))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return folder, verb.tune_seeds(asked(world, folder / "out"), SEEDS)


def test_each_seed_is_a_run_with_its_report(whole):
    folder, report = whole
    assert [s["seed"] for s in report["seeds"]] == [0, 1, 2]
    reports = [json.loads((folder / "out" / f"seed-{n}" / "report.json").read_text()) for n in range(SEEDS)]
    assert len({r["task"]["after"]["value"] for r in reports} | {str(r["training"]["loss"]) for r in reports}) > 1
    assert [s["task"] for s in report["seeds"]] == [r["task"]["after"]["value"] for r in reports]
    for name in ("seeds.html", "seeds.md"):
        assert "Over seeds 0, 1, 2" in (folder / "out" / name).read_text()


def test_all_seeds_are_measured_on_the_same_rows(whole):
    folder, _ = whole
    afters = [json.loads((folder / "out" / f"seed-{n}" / "after.json").read_text()) for n in range(SEEDS)]
    assert len({str([i["id"] for i in a["task"]]) for a in afters}) == 1


def test_the_verdict_is_of_all(whole):
    _, report = whole
    (ability,) = report["abilities"]
    assert len(ability["runs"]) == SEEDS
    assert ability["retention"]["value"] == pytest.approx(sum(ability["runs"]) / SEEDS)
    shares = [s["kept"]["language"] for s in report["seeds"]]
    assert ability["runs"] == pytest.approx(shares)
    assert report["task"]["after"]["value"] == pytest.approx(sum(s["task"] for s in report["seeds"]) / SEEDS)


def test_it_goes_on_where_it_was(whole, world, monkeypatch):
    folder, report = whole
    monkeypatch.setattr("holdfast.runs.job.checked", None)
    again = verb.tune_seeds(asked(world, folder / "out"), SEEDS)
    assert {**again, "created": 0} == {**json.loads(json.dumps(report)), "created": 0}


def test_seeds_of_two_machines_are_not_compared(whole, world, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole[0] / "out", folder)
    after = json.loads((folder / "seed-1" / "after.json").read_text())
    (folder / "seed-1" / "after.json").write_text(json.dumps({**after, "made": ["torch 1.0"]}))
    with pytest.raises(HoldfastError, match=r"seed-1 was measured by other versions.* than .*seed-0"):
        seeds.summarised(list(seeds.runs_of(asked(world, folder), folder, SEEDS, silent)), folder)


def test_no_repository_is_uploaded_over_by_the_next_seed(world, tmp_path):
    recipe = asked(world, tmp_path / "out")
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"push_to_hub": "me/mine"})})
    with pytest.raises(RecipeError, match="push_to_hub me/mine can hold one model, and 2 seeds make 2"):
        verb.tune_seeds(recipe, 2)


def test_one_seed_over_the_budget_is_told(world, tmp_path, monkeypatch, capsys):
    """The first seed meets its bound; the second cannot, since nothing of the change may be taken back."""
    plain = settle._point

    def bent(job, *args):
        margin = -1.0 if job.recipe.training.seed == 1 else 0.0
        return dataclasses.replace(plain(job, *args), margin=margin, likely=margin)

    monkeypatch.setattr(settle, "_point", bent)
    measure = {"suites": ["language"], "limit": 4, "num_fewshot": 0, "keep": {"language": 0.9}}
    rows, steps = {"validation_size": 12}, {"max_steps": 2}
    data = recipe_data(world, tmp_path / "out", measure=measure, training=steps, data=rows)
    path = write_recipe(tmp_path / "r.yaml", data)
    command = ["holdfast", "tune", str(path), "--seeds", "2", "--keep", "language=0.9"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "the budget is not met with seeds 1;" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("seeds", "changes", "words"),
    [(1, {}, "--seeds 1"), (0, {}, "--seeds 0"), (2, {"skip_before": True}, "skip_before")],
)
def test_what_cannot_have_seeds(world, tmp_path, seeds, changes, words):
    with pytest.raises(RecipeError, match=words):
        verb.tune_seeds(asked(world, tmp_path / "out", **changes), seeds)


def test_a_seed_of_the_order_moves_with_the_others(world):
    """Else all runs of a plan without an adapter would be one."""
    one = asked(world, world.folder / "order")
    fixed = one.model_copy(update={"training": one.training.model_copy(update={"data_seed": 5})})
    found = [run.recipe.training for run in seeds.runs_of(fixed, world.folder, 3, silent)]
    first = one.training.seed
    assert [(t.seed, t.data_seed) for t in found] == [(first + n, 5 + n) for n in range(3)]


def test_the_command(whole, world, monkeypatch, capsys):
    folder, _ = whole
    recipe = asked(world, folder / "out").model_dump(mode="json")
    path = write_recipe(folder / "recipe.yaml", recipe)
    monkeypatch.setattr(sys, "argv", ["holdfast", "tune", str(path), "--seeds", str(SEEDS)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "Seed 2" in out and "seeds.html" in out
