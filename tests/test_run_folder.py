"""The run folder by itself, without a model or a plan: whose it is, what is finished, what it began with."""

import json

import pytest

from holdfast.errors import RecipeError, TrainingError
from holdfast.recipe import load_recipe
from holdfast.runs.folder import RunFolder
from tiny_run import write_recipe

WORK = {"piece.json"}


@pytest.fixture
def folder(tmp_path):
    """folder(seed): the folder of a recipe, all at the same place."""

    def of(seed: int = 0) -> RunFolder:
        out = tmp_path / "deep" / "run"
        data = {"model": {"model_name_or_path": "/nowhere"}, "data": {"train": "/nowhere.jsonl"}}
        data["training"] = {"output_dir": str(out), "seed": seed}
        return RunFolder(out, load_recipe(write_recipe(tmp_path / "recipe.yaml", data)), WORK)

    return of


def test_a_claimed_folder_holds_its_recipe_and_nothing_else(folder):
    mine = folder()
    assert not mine.has_work and not mine.finished
    mine.claim()
    assert [p.name for p in mine.path.iterdir()] == ["recipe.yaml"]
    assert load_recipe(mine.path / "recipe.yaml") == mine.recipe
    mine.claim()  # again: it is ours


def test_before_there_is_work_another_recipe_may_take_it(folder):
    folder(0).claim()
    folder(1).claim()
    assert load_recipe(folder().path / "recipe.yaml") == folder(1).recipe


def test_work_belongs_to_its_recipe_for_good(folder):
    folder(0).claim()
    folder(0).write("piece.json", [1])
    with pytest.raises(RecipeError, match="a run of another recipe"):
        folder(1).claim()
    folder(0).claim()
    assert folder(0).read("piece.json") == [1] and folder(0).has_work


@pytest.mark.parametrize("wish", ['{"methods": ["LoRA"]}', "no: [recipe"])
def test_work_of_another_kind_is_left_alone(folder, wish):
    """A comparison's or a repair's folder has other files than a run's; its recipe.yaml is not one of `tune`."""
    mine = folder()
    mine.path.mkdir(parents=True)
    (mine.path / "recipe.yaml").write_text(wish)
    (mine.path / "unknown.json").write_text("{}")
    with pytest.raises(RecipeError, match="a run of another recipe"):
        mine.claim()
    assert (mine.path / "recipe.yaml").read_text() == wish


def test_somebody_elses_files_are_left_alone(folder):
    mine = folder()
    mine.path.mkdir(parents=True)
    (mine.path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds no Holdfast run"):
        mine.claim()
    assert [p.name for p in mine.path.iterdir()] == ["thesis.txt"]


def test_killed_while_claiming(folder):
    mine = folder()
    mine.path.mkdir(parents=True)
    (mine.path / "recipe.yaml.new").write_text("half of a reci")
    mine.claim()
    assert [p.name for p in mine.path.iterdir()] == ["recipe.yaml"]


def test_a_file_in_the_way(folder):
    mine = folder()
    mine.path.parent.write_text("a file where the folder above should be")
    with pytest.raises(RecipeError, match="cannot be written"):
        mine.claim()


def test_it_is_finished_when_its_report_is_there(folder):
    folder(0).claim()
    folder(0).write("report.json", {})
    assert folder(0).finished and not folder(1).finished


def test_a_piece_is_whole_or_absent(folder):
    mine = folder()
    mine.claim()
    assert mine.read("piece.json") is None
    mine.write("piece.json", {"a": 1})
    with pytest.raises(ValueError):
        mine.write("piece.json", {"a": float("nan")})
    assert mine.read("piece.json") == {"a": 1}
    assert {p.name for p in mine.path.iterdir()} == {"recipe.yaml", "piece.json"}


def test_work_goes_on_with_what_it_began_with(folder):
    mine = folder()
    mine.claim()
    mine.keep_inputs({"model": "a", "data": "b"})
    mine.keep_inputs({"model": "c", "data": "b"})  # nothing was made of it yet
    mine.write("piece.json", [])
    mine.keep_inputs({"model": "c", "data": "b"})
    with pytest.raises(RecipeError, match="The data of this recipe is no longer"):
        mine.keep_inputs({"model": "c", "data": "d"})
    assert mine.read("inputs.json") == {"model": "c", "data": "b"}


def test_room_on_the_disk(folder):
    mine = folder()
    mine.claim()
    mine.check_room(1, "two small things")
    with pytest.raises(TrainingError, match=r"two great things need up to 1000000000\.0 GB"):
        mine.check_room(10**18, "two great things")


def test_lines_are_added_to_the_log(folder):
    mine = folder()
    mine.claim()
    for step in (1, 2):
        mine.log({"step": step})
    lines = (mine.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
