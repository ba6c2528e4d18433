"""`holdfast init`: what it writes is a recipe that reads the data; and the schema that editors check recipes with."""

import json
from pathlib import Path

import pytest
import yaml

from holdfast.data import propose
from holdfast.data.rows import read_rows
from holdfast.errors import DataError, RecipeError
from holdfast.recipe import RECIPE_DIR, SCHEMA_FILE, Recipe, json_schema, load_recipe
from holdfast.verbs.init import init

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
FOUND = {  # the row (# becomes its number): (schema, prompt, completion, metric)
    "labels": ({"text": "broken #", "queue": "billing"}, (None, "{text}\nQueue:", " {queue}", "accuracy")),
    "two columns and an id": (
        {"id": 7, "premise": "a #", "hypothesis": "b #", "label": 1},
        (None, "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:", " {label}", "accuracy"),
    ),
    "numbers": ({"question": "What is # + 1?", "answer": "#"}, (None, "{question}\nAnswer:", " {answer}", "number")),
    "no name that tells": (
        {"note": "a long note #", "kind": "x"},
        (None, "{note}\nKind:", " {kind}", "accuracy"),
    ),
    "free text": ({"prompt": "Say #.", "completion": " It is # today."}, ("prompt/completion", None, None, "loss")),
    "alpaca": ({"instruction": "Say #", "input": "", "output": "so # it is"}, ("alpaca", None, None, "loss")),
    "messages": ({"messages": TURNS}, ("messages", None, None, "accuracy")),  # one answer: a closed set
    "plain": ({"text": "Once # upon a time."}, ("text", None, None, "loss_per_byte")),
    "documents": (
        {
            "text": "Once # upon a time. " * 20,
            "id": "#",
            "dump": "CC-MAIN",
            "url": "http://x",
            "file_path": "s3://x",
            "language": "en",
            "language_score": 0.9,
            "token_count": 99,
        },
        (None, "", "{text}", "loss_per_byte"),
    ),
    "long texts of a kind": (
        {"text": "Once # upon a time. " * 20, "language_score": 0.9, "kind": "x"},
        (None, "{text}\nKind:", " {kind}", "accuracy"),
    ),
}


def numbered(value, n: int):
    return value.replace("#", str(n)) if isinstance(value, str) else value


def write(path: Path, row: dict, count: int = 60) -> Path:
    rows = [{k: numbered(v, n) for k, v in row.items()} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FOUND)
def test_a_data_file_becomes_a_recipe(tmp_path, monkeypatch, tokenizer, name):
    monkeypatch.chdir(tmp_path)
    row, (schema, prompt, completion, metric) = FOUND[name]
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "train.jsonl", row)
    (found,) = init(["deep/train.jsonl"], Path("my.yaml"), "some/model")
    assert (found.schema, found.prompt, found.completion, found.metric) == (schema, prompt, completion, metric)
    recipe = load_recipe("my.yaml")
    assert recipe.data.name == "deep" and recipe.model.model_name_or_path == "some/model"
    assert (recipe.data.prompt, recipe.data.completion, recipe.data.metric) == (prompt, completion, metric)
    if name != "messages":  # those need a tokenizer with a template
        rows = read_rows(recipe.data.train, prompt=prompt, completion=completion, base_dir=tmp_path, notes=[])
        assert len(rows) == 60


def test_several_files_become_sets(tmp_path, monkeypatch):
    """Each with its templates; one metric that all of them can have."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tickets.jsonl", FOUND["labels"][0])
    write(tmp_path / "said.jsonl", FOUND["free text"][0])
    found = init(["tickets.jsonl", "said.jsonl"], Path("r.yaml"), "m")
    assert [one.metric for one in found] == ["accuracy", "loss"]
    data = load_recipe("r.yaml").data
    assert [(s.title, s.prompt) for s in data.sets("train")] == [("tickets", "{text}\nQueue:"), ("said", None)]
    assert (data.metric, data.name, data.prompt) == ("loss", "tickets-said", None)


def test_of_a_hub_set_the_train_split_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def records(source, base_dir):
        asked.append(source)
        return iter([(f"{n}", {"text": f"broken {n}", "queue": "billing"}) for n in range(60)]), None

    monkeypatch.setattr(propose, "records_of", records)
    init(["some/set"], Path("r.yaml"), "m")
    init(["some/set", "some/other"], Path("both.yaml"), "m")
    assert {s.split for s in asked} == {"train"}
    assert (load_recipe("r.yaml").data.train.path, load_recipe("r.yaml").data.train.split) == ("some/set", "train")
    assert [s.split for s in load_recipe("both.yaml").data.train] == ["train", "train"]


def test_a_recipe_elsewhere_finds_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", FOUND["labels"][0])
    (tmp_path / "recipes").mkdir()
    init(["train.jsonl"], Path("recipes/r.yaml"), "m")
    monkeypatch.chdir("/")
    data = load_recipe(tmp_path / "recipes" / "r.yaml").data
    assert data.validation and data.test
    paths = [Path(s.path) for s in (data.train, data.validation, data.test)]
    assert [p.name for p in paths] == ["train.jsonl", "dev.jsonl", "test.jsonl"] and all(p.is_file() for p in paths)


DOLLY = {"instruction": "Say #.", "context": "In # words.", "response": "So # it is.", "category": "qa"}


def test_what_is_left_out_is_said(tmp_path, monkeypatch):
    """A column that is blank somewhere, numbers beside text, objects, a second answer, an id."""
    monkeypatch.chdir(tmp_path)
    more = {"id": 1, "score": 3, "meta_of": {"a": 1}}
    rows = [{k: numbered(v, n) for k, v in {**DOLLY, **more}.items()} for n in range(60)]
    for row in rows[:12]:
        row["context"] = ""
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write(tmp_path / "other.jsonl", FOUND["labels"][0])
    (found,) = init(["d.jsonl"], Path("r.yaml"), "m")
    assert (found.prompt, found.completion) == ("{instruction}\nResponse:", " {response}")
    said = {
        "id (bookkeeping)",
        "context (blank in 12 of 60 rows)",
        "meta_of (an object)",
        "score (a number beside text)",
    }
    assert set(found.left_out) == said | {"category (called like another answer)"}
    (line,) = [line for line in Path("r.yaml").read_text(encoding="utf-8").splitlines() if "left out" in line]
    assert line == f"  # left out: {', '.join(found.left_out)}"
    init(["d.jsonl", "other.jsonl"], Path("both.yaml"), "m")
    assert "      # left out: id (bookkeeping)" in Path("both.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"context": "a long # text", "question": "Why #?", "answers": {"text": ["x"]}}, "'answers' .*an object"),
        ({"question": "Why #?", "note": "a #", "answer": ""}, "'answer' .*blank in 60 of 60 rows"),
    ],
)
def test_an_answer_that_cannot_be_written_is_not_guessed(tmp_path, monkeypatch, row, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", row)
    with pytest.raises(DataError, match=said) as told:
        init(["d.jsonl"], Path("r.yaml"), "m")
    assert "data.prompt and data.completion" in told.value.cure


def test_odd_names_stay_one_line_of_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", {"a\n- b": "x #", "we#ird\u2028": "y #", "no: {way": "z", "label": "z"})
    init(["d.jsonl"], Path("r.yaml"), "m: odd # model")
    recipe = load_recipe("r.yaml")
    assert recipe.model.model_name_or_path == "m: odd # model"
    assert recipe.data.prompt == "A\n- b: {a\n- b}\nWe#ird: {we#ird\u2028}\nLabel:"


def test_what_cannot_be_proposed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"chosen": "x", "rejected": "y", "prompt": "p"})
    write(tmp_path / "b.jsonl", {"only": "x"})
    with pytest.raises(DataError, match="preference data"):
        init(["a.jsonl"], Path("r.yaml"), "m")
    with pytest.raises(DataError, match="no two columns"):
        init(["b.jsonl"], Path("r.yaml"), "m")
    with pytest.raises(DataError, match="no such file"):
        init(["c.jsonl"], Path("r.yaml"), "m")
    assert not Path("r.yaml").exists()
    Path("r.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="yaml exists"):
        init(["b.jsonl"], Path("r.yaml"), "m")
    assert Path("r.yaml").read_text() == "mine"


# ---- the schema


def test_the_shipped_schema_is_the_model():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema(), "run: python tools/make_docs.py"
    schema = json.loads(json_schema())
    assert schema["required"] == ["model", "data"] and set(schema["properties"]) == set(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        if keys:
            part = schema["$defs"][field.annotation.__name__]
            assert set(part["properties"]) == set(keys) and part["additionalProperties"] is False, name
            assert all(p.get("description") for p in part["properties"].values())


def test_a_written_recipe_names_the_schema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", FOUND["labels"][0])
    init(["d.jsonl"], Path("r.yaml"), "m")
    first = Path("r.yaml").read_text(encoding="utf-8").splitlines()[0]
    path = first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(Path(path).read_text(encoding="utf-8"))["title"] == "A recipe of Holdfast"


def test_an_editor_takes_what_we_take(tmp_path, monkeypatch):
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json.loads(json_schema())).is_valid
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", FOUND["labels"][0])
    init(["d.jsonl"], Path("r.yaml"), "m")
    for path in (Path("r.yaml"), *RECIPE_DIR.glob("*.yaml")):
        assert check(yaml.safe_load(path.read_text(encoding="utf-8"))), path
    small = {"model": {"model_name_or_path": "m"}, "data": {"train": "x"}}
    plan = ["LoRA", {"KL": None}, {"ICLAnchor": {"weight": 1}}]
    good = ({"training": None}, {"plan": plan}, {"training": {"report_to": "none"}},
            {"training": {"report_to": ["wandb"]}}, {"data": {"train": {"path": "x", "split": "train"}}},
            {"data": {"train": ["a", {"path": "b", "weight": 2}], "test": ["c"]}})  # fmt: skip
    for more in good:
        assert check({**small, **more}), more
    bad = ({"trainng": {}}, {"training": {"learning_rate": "fast"}}, {"training": {"report_to": "comet_ml"}},
           {"data": {"train": ""}}, {"data": {"train": []}}, {"data": {"train": [3]}}, {"data": {}}, {"plan": "LoRA"},
           {"measure": {"keep": {"a": 2}}})  # fmt: skip
    for more in bad:
        assert not check({**small, **more}), more
