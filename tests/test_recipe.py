"""The recipe: what is accepted, what is refused with which words, and that a saved one reads back equal."""

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.errors import DataError, RecipeError
from holdfast.foreign_keys import FOREIGN
from holdfast.recipe import Recipe, Training, load_recipe, recipe_from, recipe_schema, template_columns

SMALL = "model: {model_name_or_path: m}\ndata: {train: org/set}\n"
FULL = """\
model:
  model_name_or_path: smollm2-135m
  dtype: bfloat16
data:
  train: holdfast:tickets/train.jsonl
  test: {path: org/set, split: test, revision: abc}
  validation_size: 200
  prompt: "{text}\\nQueue:"
  completion: " {queue}"
training:
  learning_rate: 3e-4
  adam_epsilon: 1E-8
  warmup_steps: 10
plan:
  - LoRA: {r: 16, dropout: 1e-2}
  - ICLAnchor
  - KL:
measure: {suites: [in-context, facts], num_fewshot: 4}
export:
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_full_recipe_is_read(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.model.model_name_or_path == "smollm2-135m" and recipe.model.dtype == "bfloat16"
    assert recipe.data.name == "tickets" and recipe.data.train.path == "holdfast:tickets/train.jsonl"
    assert recipe.data.test is not None and recipe.data.test.split == "test"
    assert recipe.training.learning_rate == 3e-4 and recipe.training.adam_epsilon == 1e-8
    assert recipe.data.prompt == "{text}\nQueue:" and recipe.data.validation_size == 200
    assert recipe.plan == [{"LoRA": {"r": 16, "dropout": 0.01}}, "ICLAnchor", {"KL": {}}]
    assert recipe.measure.floors == {"in-context": 0.97}  # the others prove what their items can
    assert recipe.export.merge is False


def test_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, SMALL))
    assert (recipe.plan, recipe.data.validation, recipe.data.max_length) == (None, None, 1024)
    assert (recipe.training.per_device_train_batch_size, recipe.training.max_steps) == (16, -1)
    assert recipe.measure.keep is None and recipe.measure.floors == {"in-context": 0.97} and recipe.data.name == "set"


BAD = {  # name: (text, fragments of the message)
    "unknown": (
        SMALL + "training:\n  learning_rte: 1\n",
        ["r.yaml:4: training.learning_rte", "'learning_rate'"],
    ),
    "unknown section": (SMALL + "trainng: {}\n", ["r.yaml:3: trainng is not a known key", "'training'"]),
    "wrong section": (SMALL + "seed: 1\n", ["r.yaml:3: seed is not a known key", "belongs under training"]),
    "key of two sections": (SMALL + "dtype: auto\n", ["r.yaml:3: dtype is not a known key", "belongs under model"]),
    "like a key of a section": (SMALL + "torch_dtype: auto\n", ["r.yaml:3: torch_dtype", "Write model.dtype"]),
    "key of a trainer": (
        SMALL + "training: {group_by_length: true}",
        ["r.yaml:3: training.group_by_length is not a key here: rows are laid end to end", "Curriculum"],
    ),
    "adapter settings outside of the plan": (SMALL + "lora_r: 8\n", ["r.yaml:3: lora_r is not a key", "plan: [{LoRA"]),
    "warm-up given twice": (
        SMALL + "training: {warmup_ratio: 0.1, warmup_steps: 3}",
        ["r.yaml:3: training does not agree", "warmup_steps alone"],
    ),
    "warm-up of more than all": (SMALL + "training: {warmup_ratio: 10}", ["warmup_steps alone"]),
    "seed of too many bits": (SMALL + "training: {seed: 4294967296}", ["expected a number below 4294967296"]),
    "unknown before missing": (
        "model: {model_name: m}\ndata: {train: x}\n",
        ["r.yaml:1: model.model_name is not"],
    ),
    "unknown in source": (
        "model: {model_name_or_path: m}\ndata:\n  train: {path: x, splt: a}",
        ["r.yaml:3: data.train.splt", "'split'"],
    ),
    "key that is a number": (SMALL + "7: 1\n", ["r.yaml:3: 7 is not a known key"]),
    "missing": ("model: {model_name_or_path: m}\n", ["r.yaml: data is missing", "Add data"]),
    "missing inside": ("model:\ndata: {train: x}\n", ["r.yaml:1: model.model_name_or_path is missing"]),
    "text for number": (
        SMALL + "training: {learning_rate: fast}",
        ["r.yaml:3: training.learning_rate is 'fast' (text)", "expected a number above 0, auto or search"],
    ),
    "number for text": (SMALL.replace(": m}", ": 7}"), ["is 7 (a number), expected text", "quotes"]),
    "bool for int": (
        SMALL + "training: {save_steps: true}",
        ["True (true or false), expected a whole number"],
    ),
    "float for int": (SMALL + "training: {save_steps: 1.5}", ["1.5", "expected a whole number"]),
    "text for bool": (SMALL + "training: {gradient_checkpointing: 'y'}", ["expected true or false"]),
    "not finite": (SMALL + "training: {learning_rate: .nan}", ["expected a number above 0"]),
    "too low": (SMALL + "training: {learning_rate: 0}", ["expected a number above 0"]),
    "choice": (SMALL + "training: {lr_scheduler_type: cosin}", ["one of 'linear', 'cosine'"]),
    "half a step": (SMALL + "training: {warmup_steps: 2.5}", ["2.5", "fraction below 1, or a whole count"]),
    "no steps": (SMALL + "training: {max_steps: 0}", ["-1 (num_train_epochs decides)"]),
    "tracker": (SMALL + "training: {report_to: comet_ml}", ["'comet_ml'", "one of 'tensorboard', 'trackio'"]),
    "section is a number": (SMALL + "training: 3\n", ["training is 3 (a number), expected a section"]),
    "plan is a mapping": (SMALL + "plan: {LoRA: {r: 8}}", ["r.yaml:3: plan is", "expected a list"]),
    "plan entry": (SMALL + "plan:\n  - LoRA\n  - 3\n", ["r.yaml:5: plan.1 is 3", "a method name, or one"]),
    "plan entry of two": (
        SMALL + "plan:\n  - {A: {}, B: {}}\n",
        ["r.yaml:4: plan.0", "a method name, or one"],
    ),
    "suite not measured": (
        SMALL + "measure: {suites: [a], keep: {b: 0.9}}",
        ["r.yaml:3: measure does not agree", "b is not in suites"],
    ),
    "floor above one": (
        SMALL + "measure: {keep: {in-context: 97}}",
        ["measure.keep.in-context is 97", "at most 1"],
    ),
    "one template": (
        "model: {model_name_or_path: m}\ndata: {train: x, prompt: '{a}'}",
        ["r.yaml:2: data does not agree", "prompt and completion together"],
    ),
    "template reaching in": (
        "model: {model_name_or_path: m}\ndata:\n  train: x\n  prompt: '{a.b}'\n  completion: '{c}'",
        ["r.yaml:4: data.prompt", "'a.b'", "Only plain {column} fields"],
    ),
    "completion without column": (
        "model: {model_name_or_path: m}\ndata: {train: x, prompt: '{a}', completion: yes sir}",
        ["the same for every row"],
    ),
    "nothing to report on": (
        "model: {model_name_or_path: m}\ndata: {train: x, validation_size: 0}",
        ["validation_size above 0"],
    ),
    "a cut beside a set": (
        "model: {model_name_or_path: m}\ndata: {train: x, validation: y, validation_size: 0.1}",
        ["no validation_size beside validation"],
    ),
    "a stride of nothing": (
        "model: {model_name_or_path: m}\ndata: {train: x, too_long: drop, stride: 8}",
        ["no stride beside too_long drop"],
    ),
    "repeated": (
        SMALL + "training:\n  seed: 1\n  seed: 2\n",
        ["r.yaml:5: training.seed is given twice", ":4)"],
    ),
    "repeated section": (SMALL + "model: {}\n", ["r.yaml:3: model is given twice (first at"]),
    "syntax": (SMALL + "training: [1,\n", ["r.yaml:4: not valid YAML"]),
    "tab": (SMALL + "training:\n\tseed: 1\n", ["r.yaml:4: not valid YAML"]),
    "two documents": (SMALL + "---\na: 1\n", ["r.yaml:3: not valid YAML"]),
    "python tag": (
        SMALL + "plan: !!python/object/apply:os.system ['true']\n",
        ["r.yaml:3: the YAML tag", "refused"],
    ),
    "alias": (SMALL + "plan: [&a LoRA, *a]\n", ["r.yaml:3: *a is a YAML alias"]),
    "broken date": (SMALL + "training: {seed: 2024-13-45}\n", ["r.yaml: not valid YAML"]),
    "too deep": ("a: " + "[" * 3000, ["r.yaml"]),
    "empty": ("  \n", ["r.yaml: the file is empty"]),
    "only a comment": ("# nothing\n", ["r.yaml: holds no keys"]),
    "a list": ("- model\n", ["r.yaml: holds no keys"]),
    "not utf-8": (b"\xff\xfe\xff", ["r.yaml: cannot be read", "UTF-8"]),
    "control character": (SMALL + "plan: [\x01]\n", ["r.yaml: not valid YAML"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_refused_by_place(name, tmp_path):
    text, fragments = BAD[name]
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: there is no such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_overrides(tmp_path):
    changes = [
        "training.learning_rate=1e-5",
        "plan.0.LoRA.r=8",
        "plan.1.ICLAnchor.weight=2",
        "data.train.split=dev",
        "export.merge=true",
        "data.prompt='{text} ='",
    ]
    recipe = load_recipe(write(tmp_path, FULL), changes)
    assert recipe.training.learning_rate == 1e-5 and recipe.export.merge
    assert recipe.plan is not None
    assert recipe.plan[:2] == [{"LoRA": {"r": 8, "dropout": 0.01}}, {"ICLAnchor": {"weight": 2}}]
    assert recipe.data.train.path == "holdfast:tickets/train.jsonl" and recipe.data.train.split == "dev"
    assert recipe.data.prompt == "{text} ="


def test_the_old_name_of_a_warm_up_is_read(tmp_path):
    path = write(tmp_path, SMALL + "training: {warmup_ratio: 0.1}")
    assert load_recipe(path).training.warmup_steps == 0.1
    assert load_recipe(path, ["training.warmup_ratio=0"]).training.warmup_steps == 0.0


def test_every_setting_of_a_trainer_is_a_key_or_has_its_sentence():
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig

    fields = {name for kind in (TrainingArguments, SFTConfig, ModelConfig) for name in kind.__dataclass_fields__}
    sections = {name: field.annotation for name, field in Recipe.model_fields.items() if name != "plan"}
    keys = {key for section in sections.values() for key in section.model_fields}
    assert not keys & set(FOREIGN), "a key needs no excuse"
    assert not fields - keys - set(FOREIGN), "carry it, or say in foreign_keys.py why not"
    assert "group_by_length" in FOREIGN and "lr_scheduler_kwargs" in Training.model_fields


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_key_gets_its_own_sentence(name):
    why, cure = FOREIGN[name]
    assert cure.endswith(".") and not why.endswith(".")
    with pytest.raises(RecipeError) as caught:
        recipe_from({"model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "training": {name: 1}})
    assert f"training.{name} is not a key here: {why}." in str(caught.value) and cure in str(caught.value)


BAD_OVERRIDES = {
    "training.seed": ["override 'training.seed'", "not of the form key=value"],
    "training..seed=1": ["not of the form key=value"],
    "training.sed=1": ["override 'training.sed=1': training.sed is not a known key", "'seed'"],
    "training={sed: 1}": ["override 'training={sed: 1}': training.sed is not a known key"],
    "training.seed=x": ["override 'training.seed=x': training.seed is 'x' (text)"],
    "training.seed=[1": ["the value is not valid YAML"],
    "training.seed.x=1": ["override", "seed is 5, and has no x inside"],
    "plan.9.LoRA.r=8": ["the list has no entry 9", "It has 3, counted from 0"],
    "plan.x=8": ["the list has no entry x"],
}


@pytest.mark.parametrize("change", BAD_OVERRIDES)
def test_a_bad_override_is_refused_by_its_text(change, tmp_path):
    path = write(tmp_path, FULL.replace("training:\n", "training:\n  seed: 5\n"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [change])
    for fragment in BAD_OVERRIDES[change]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("text", [SMALL, FULL, SMALL + 'plan: [{A: {x: "3e-4", y: 3e-4, z: "no", w: 1e30}}]'])
def test_a_saved_recipe_reads_back_equal(text, tmp_path):
    recipe = load_recipe(write(tmp_path, text))
    recipe.save(tmp_path / "deep" / "saved.yaml")
    assert load_recipe(tmp_path / "deep" / "saved.yaml") == recipe
    assert isinstance(recipe, Recipe)


def test_a_quoted_number_stays_text_through_saving(tmp_path):
    load_recipe(write(tmp_path, SMALL + 'plan: [{A: {x: "3e-4", y: 3e-4}}]')).save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").plan == [{"A": {"x": "3e-4", "y": 0.0003}}]


def test_local_data_is_found_beside_the_recipe_then_here(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (here / "one.jsonl").touch()
    monkeypatch.chdir(here)
    text = "model: {model_name_or_path: m}\ndata: {train: both.jsonl, test: one.jsonl, validation: none.jsonl}"
    data = load_recipe(write(beside, text)).data
    assert data.test is not None and data.validation is not None
    assert [data.train.path, data.test.path] == [str(beside / "both.jsonl"), str(here / "one.jsonl")]
    assert data.validation.path == "none.jsonl" and data.name == "both"


def test_a_saved_recipe_finds_its_data_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").touch()
    recipe = load_recipe(write(tmp_path, "model: {model_name_or_path: m}\ndata: {train: d.jsonl}"))
    recipe.save(tmp_path / "runs" / "recipe.yaml")
    monkeypatch.chdir(tmp_path / "runs")
    assert Path(load_recipe("recipe.yaml").data.train.path).samefile(tmp_path / "d.jsonl")


def test_recipe_from_a_mapping_in_python():
    recipe = recipe_from({"model": {"model_name_or_path": "m"}, "data": {"train": Path("a") / "train.csv"}})
    assert recipe.data.train.path == str(Path("a") / "train.csv")
    with pytest.raises(RecipeError, match=r"recipe: data\.tran is not a known key"):
        recipe_from({"model": {"model_name_or_path": "m"}, "data": {"tran": "x"}})


def test_every_key_is_listed_with_default_and_description():
    lines = recipe_schema().splitlines()
    keys = [line.split()[0] for line in lines]
    assert len(keys) == len(set(keys)) > 40 and "plan" in keys
    assert all(len(line.split(maxsplit=2)) == 3 and line.rstrip().endswith(".") for line in lines)
    rate = next(line for line in lines if line.startswith("training.learning_rate "))
    assert "auto" in rate and "Peak" in rate
    assert any("model.model_name_or_path" in line and "required" in line for line in lines)
    assert any("lr_scheduler_type" in line and "constant_with_warmup" in line for line in lines)


def test_template_columns():
    assert template_columns("{a} {{x}} {b c}{a}") == ("a", "b c")
    for bad in ("{", "{}", "{a[0]}", "{a.b}", "{a!r}", "{a:>9}", "a}"):
        with pytest.raises(DataError):
            template_columns(bad)


def test_reading_a_recipe_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow'}"
    code = f"import sys, holdfast.recipe, holdfast.data.rows; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_demo_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("holdfast:demo", ["training.max_steps=4"])
    assert recipe.data.name == "tickets" and recipe.data.test.path == "holdfast:tickets/test.jsonl"
    assert (recipe.training.output_dir, recipe.training.max_steps) == ("runs/demo", 4)
    recipe.save(tmp_path / "copy.yaml")
    assert load_recipe("copy.yaml") == recipe
    for wrong in ("holdfast:dmo", "holdfast:demo.yaml", "holdfast:../recipes/demo", "holdfast:"):
        with pytest.raises(RecipeError, match=f"{wrong} is no recipe that comes with the package"):
            load_recipe(wrong)
    with pytest.raises(RecipeError, match=r"Did you mean 'holdfast:demo'\?"):
        load_recipe(Path("holdfast:dmeo"))
    with pytest.raises(RecipeError, match=r"holdfast:demo, override 'training\.sed=1'"):
        load_recipe("holdfast:demo", ["training.sed=1"])


def test_the_recipe_for_small_models_says_what_the_guide_does():
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "small_model.yaml")
    t = recipe.training
    assert (t.learning_rate, t.lr_scheduler_type, t.warmup_steps) == (2e-5, "constant", 0)
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps == 128 and list(recipe.plan) == []


def test_the_recipe_for_long_documents_keeps_its_share_of_short_text():
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "long_context.yaml")
    assert recipe.data.max_length == 8192 and list(recipe.measure.suites) == ["in-context", "language", "shots"]
    (replay,) = recipe.plan
    assert replay == {"Replay": {"share": 0.4, "unit": "tokens"}}
