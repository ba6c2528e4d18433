"""Several training sets: each with its own columns, its share of the rows, and its own line of the report."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from holdfast.data.mix import Mix
from holdfast.data.rows import Row, split
from holdfast.data.sets import draw
from holdfast.data.shares import equal, quotas
from holdfast.data.task import read_task
from holdfast.data.weights import weighted
from holdfast.engine.pack import token_row
from holdfast.errors import DataError, PlanError, RecipeError
from holdfast.recipe import load_recipe, recipe_from
from holdfast.runs import settle_heal
from holdfast.runs.run import Run
from holdfast.verbs.tune import go
from tiny import TICKETS
from tiny_run import recipe_data, write_recipe

PAIRS = [(queue, text) for queue, texts in TICKETS.items() for text in texts]


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def two(tmp_path):
    """Tickets and questions: other columns, other templates, names of files that are the same."""
    tickets = write(tmp_path / "tickets" / "train.jsonl", [{"text": t, "queue": q} for q, t in PAIRS])
    asked = [{"question": f"What is {n} and {n}?", "answer": str(2 * (n % 3))} for n in range(12)]
    sums = write(tmp_path / "sums" / "train.jsonl", asked)
    return [
        {"path": str(tickets), "prompt": "{text}\nQueue:", "completion": " {queue}"},
        {"path": str(sums), "prompt": "{question}\nAnswer:", "completion": " {answer}"},
    ]


def read(world, tmp_path, tokenizer, train, **data):
    mapping = recipe_data(world, tmp_path / "run", data={"train": train, "prompt": None, "completion": None, **data})
    return read_task(recipe_from(mapping), tokenizer, tmp_path, 512)


# ---- proportions


def rows_of(**sizes: int):
    return [
        token_row([n, n + 1, k], 1, source=f"task:{k}") for k, size in enumerate(sizes.values()) for n in range(size)
    ]


def test_a_weight_is_the_share_of_every_epoch():
    """A small set comes again and again, evenly; of a large one every row comes as often, over some epochs."""
    mix = Mix(rows_of(small=6, large=54), order=weighted({"task:0": 1, "task:1": 2}))
    drawn = list(islice(mix.draw(seed=3), 180))
    for epoch in (drawn[:60], drawn[60:120], drawn[120:]):
        assert Counter(r.source for r in epoch) == {"task:0": 20, "task:1": 40}
    for n in range(1, 180):  # and nearly so in every part of one
        assert abs(sum(r.source == "task:0" for r in drawn[:n]) - n / 3) < 2
    often = Counter(r.key for r in drawn[:60] if r.source == "task:0")
    assert sorted(often.values()) == [3, 3, 3, 3, 4, 4]
    large = Counter(r.key for r in drawn if r.source == "task:1")
    assert sorted(large.values()) == [2] * 42 + [3] * 12
    again = list(islice(Mix(mix.task, order=mix.order).draw(seed=3), 180))
    assert [r.key for r in again] == [r.key for r in drawn]
    assert [r.key for r in islice(mix.draw(seed=4), 180)] != [r.key for r in drawn]


def test_parts_of_a_count():
    assert quotas({"a": 1, "b": 1, "c": 1}, 10, "x") == {"a": 4, "b": 3, "c": 3}
    assert quotas({"a": 1000, "b": 1}, 10, "x") == {"a": 9, "b": 1}
    assert quotas({"a": 0.2, "b": 0.8}, 5, "x") == {"a": 1, "b": 4}
    with pytest.raises(DataError, match="test_size is 1, and there are 2 sets"):
        quotas({"a": 1, "b": 1}, 1, "data.test_size")


def test_every_set_gives_its_part_of_what_is_held_out():
    rows = [Row(f"{n}", "x", source=f"task:{'ab'[n >= 90]}") for n in range(100)]
    for size in (0.1, 10):
        left, cut = split(rows, size, seed=0)
        assert Counter(rows[i].source for i in cut) == {"task:a": 9, "task:b": 1} and len(left) == 90
    with pytest.raises(DataError, match=r"Cannot cut 1 of 1 rows of b \(1 distinct\)"):
        split(rows[:91], 0.1, seed=0)
    drawn = draw(rows, lambda row: row.source, 20, 0, "data.train_size")
    assert Counter(row.source for row in drawn) == {"task:a": 18, "task:b": 2}


def test_equal_parts_of_a_count():
    assert equal({"a": 1000, "b": 3, "c": 900}, 20, "x") == {"a": 9, "b": 3, "c": 8}
    assert equal({"a": 5, "b": 5}, 7, "x") == {"a": 3, "b": 4}
    with pytest.raises(DataError, match="test_size is 1, and there are 2 sets"):
        equal({"a": 1, "b": 1}, 1, "data.test_size")


@pytest.mark.parametrize("where", ["test", "train"])
def test_a_small_set_is_measured_on_as_many_rows_as_a_large_one(world, tmp_path, tokenizer, two, where):
    """Of test sets all it has; of training sets its tenth, which by size would be a row."""
    for one, count in zip(two, (400, 60), strict=True):
        rows = [
            {"text": f"a {n}", "queue": "x", "question": f"b {n}", "answer": "y"}
            for n in range(count if where == "train" else count // 10)
        ]
        write(Path(one["path"]).with_name(f"{where}.jsonl"), rows)
    more = {"test": [one["path"].replace("train", "test") for one in two], "validation_size": 0}
    task = read(world, tmp_path, tokenizer, two, test_size=14, metric="loss", **(
        more if where == "test" else {"validation_size": None}
    ))  # fmt: skip
    assert Counter(row.source for row in task.test) == {"task:tickets": 8, "task:sums": 6}


def test_healing_draws_the_sets_as_the_training_does(world, tmp_path, two, monkeypatch):
    train = [{**two[0], "weight": 1}, {**two[1], "weight": 3}]
    recipe = recipe_from(recipe_data(world, tmp_path / "run", data={"train": train, "prompt": None}
                                     | {"completion": None}))  # fmt: skip
    rows = [token_row([n, n + 1], 1, source=f"task:{'tickets' if n < 900 else 'sums'}") for n in range(1000)]
    monkeypatch.setattr(settle_heal, "PROMPTS", 40)
    job = SimpleNamespace(run=Run(recipe, tmp_path), task=SimpleNamespace(token_rows=rows))
    assert Counter(row.source for row in settle_heal._rows(job)) == {"task:tickets": 10, "task:sums": 30}


# ---- reading


def test_each_set_has_its_own_columns_and_places(world, tmp_path, tokenizer, two):
    task = read(world, tmp_path, tokenizer, two)
    assert set(task.token_rows.sources) == {"task:tickets", "task:sums"} == {row.source for row in task.test}
    assert {row.where for row in task.test} <= {
        f"{s}/train.jsonl:{n}" for s in ("tickets", "sums") for n in range(1, 25)
    }
    assert task.metric == "accuracy" and task.labels and " 4" in task.labels and " billing" in task.labels
    row = task.token_rows[len(task.token_rows) - 1]
    assert row.source == "task:sums" and row.of_task and task.place(row).startswith("sums/train.jsonl:")
    again = read(world, tmp_path, tokenizer, two)  # from the disk
    assert [(r.source, r.prompt) for r in again.test] == [(r.source, r.prompt) for r in task.test]
    swapped = read(world, tmp_path, tokenizer, [{**two[0], "alias": "other"}, two[1]])
    assert swapped.key != task.key and "task:other" in swapped.token_rows.sources


def test_test_sets_take_the_templates_of_their_training_set(world, tmp_path, tokenizer, two):
    test = [str(Path(one["path"]).with_name("test.jsonl")) for one in two]
    write(Path(test[0]), [{"text": "Where is it?", "queue": "shipping"}])
    write(Path(test[1]), [{"question": "What is 1 and 1?", "answer": "2"}])
    task = read(world, tmp_path, tokenizer, two, test=test, validation_size=0)
    assert {(r.source, r.completion) for r in task.test} == {("task:tickets", " shipping"), ("task:sums", " 2")}
    assert len(task.train) == 36


def test_a_set_of_free_answers_makes_the_metric_the_loss(world, tmp_path, tokenizer, two):
    """Few free rows beside many labels are no closed set, however few values there are together."""
    free = write(tmp_path / "free.jsonl", [{"prompt": f"Say {n}.", "completion": f" It is {n}."} for n in range(8)])
    assert read(world, tmp_path, tokenizer, [two[0], str(free)]).metric == "loss"
    text = write(tmp_path / "text.jsonl", [{"text": f"Once {n} upon a time."} for n in range(8)])
    assert read(world, tmp_path, tokenizer, [two[0], str(text)]).metric == "loss_per_byte"
    with pytest.raises(DataError, match="accuracy, but the answers of the set 'free' are no closed set"):
        read(world, tmp_path, tokenizer, [two[0], str(free)], metric="accuracy")


def test_faults_of_one_set_name_it(world, tmp_path, tokenizer, two):
    for name, row, said in (
        ("sums", {"question": "What is it?"}, r"sums/train\.jsonl:13: no column 'answer'"),
        ("tickets", {"text": "", "queue": ""}, r"tickets/train\.jsonl:25: the prompt is empty"),
    ):
        path = tmp_path / name / "train.jsonl"
        kept = path.read_text(encoding="utf-8")
        path.write_text(kept + json.dumps(row) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=said):
            read(world, tmp_path, tokenizer, two)
        path.write_text(kept, encoding="utf-8")
    long = [{"question": "What is it? " * 40, "answer": str(n)} for n in range(12)]
    write(tmp_path / "sums" / "train.jsonl", long)
    with pytest.raises(DataError, match="of sums are longer than max_length 64"):
        read(world, tmp_path, tokenizer, two, max_length=64, metric="loss")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("[]", "r.yaml:4: data.train is [] (list), expected a list that is not empty"),
        ("[a.jsonl, b/a.jsonl]", "two are called 'a'"),
        ("[a.jsonl, {path: b.jsonl, weight: 0}]", "r.yaml:4: data.train.1.weight is 0 (a number), expected"),
        ("[a.jsonl, {path: b.jsonl, weight: -2}]", "data.train.1.weight is -2"),
        ("[a.jsonl, {path: b.jsonl, weight: 2}]", "a weight on every set or on none, and 'a' has none"),
        ("{path: a.jsonl, weight: 2}", "no weight, for it is one set"),
        ("[{path: a.jsonl, prompt: '{x}'}, b.jsonl]", "prompt and completion together"),
        ("[{path: a.jsonl, wight: 2}]", "r.yaml:4: data.train.0.wight is not a known key. Did you mean 'weight'?"),
    ],
)  # fmt: skip
def test_bad_lists_are_refused_with_the_line(tmp_path, train, said):
    path = tmp_path / "r.yaml"
    path.write_text(f"model:\n  model_name_or_path: m\ndata:\n  train: {train}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert said in f"{error.value.what} {error.value.cure}".replace(str(tmp_path) + "/", "")


def test_a_list_is_found_saved_and_overridden(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "train.jsonl", [{"text": "x"}])
    path = tmp_path / "r.yaml"
    text = "model:\n  model_name_or_path: m\ndata:\n  train: [a/train.jsonl, {path: b/train.jsonl}]\n"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path, ["data.train.0.weight=1", "data.train.1.weight=2.5"])
    sets = recipe.data.sets("train")
    assert [(one.title, one.weight, Path(one.path).is_absolute()) for one in sets] == [
        ("a", 1, True),
        ("b", 2.5, True),
    ]
    assert recipe.data.name == "a-b"
    recipe.save(tmp_path / "saved" / "s.yaml")
    assert load_recipe(tmp_path / "saved" / "s.yaml") == recipe


# ---- a whole run


def ran(world, tmp_path, two, **training):
    train = [{**two[0], "weight": 1}, {**two[1], "weight": 3}]
    data = {"train": train, "prompt": None, "completion": None, "validation_size": 0.25}
    recipe = recipe_data(world, tmp_path / "run", data=data, training={"max_steps": 7, **training})
    path = write_recipe(tmp_path / "r.yaml", recipe)
    go(Run(load_recipe(path), tmp_path))
    return json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))


def test_a_run_reports_each_set(world, tmp_path, two):
    report = ran(world, tmp_path, two)
    assert [(s["name"], s["weight"], s["rows"], s["drawn"]) for s in report["data"]["sets"]] == [
        ("tickets", 1.0, 18, 7),
        ("sums", 3.0, 9, 21),
    ]
    assert {s["name"]: s["after"]["n"] for s in report["task"]["sets"]} == {"tickets": 6, "sums": 3}
    whole = sum(s["after"]["value"] * s["after"]["n"] for s in report["task"]["sets"]) / 9
    assert np.isclose(whole, report["task"]["after"]["value"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Your task on sums" in page and "Times each" in page and "2.33" in page
    assert "| on sums |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_explain_shows_what_an_epoch_draws(world, tmp_path, two, capsys):
    from holdfast.verbs.explain import command

    train = [{**two[0], "weight": 1}, {**two[1], "weight": 3}]
    data = {"train": train, "prompt": None, "completion": None, "validation_size": 0.25}
    command(write_recipe(tmp_path / "r.yaml", recipe_data(world, tmp_path / "run", data=data)), (), 0)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["\u2502", "tickets", "\u2502", "1", "\u2502", "18", "\u2502", "7", "\u2502"] in said
    assert ["\u2502", "sums", "\u2502", "3", "\u2502", "9", "\u2502", "20", "\u2502"] in said


def test_methods_that_balance_sources_see_the_sets(world, tmp_path, two):
    from holdfast.verbs.explain import planned

    data = {"train": [{**one, "weight": 1} for one in two], "prompt": None, "completion": None}
    recipe = recipe_data(world, tmp_path / "run", data=data)

    def job(*plan):
        return planned(recipe_from({**recipe, "plan": [{"LoRA": {"r": 2}}, *plan]}), tmp_path)

    job({"MFTCoder": {"weights": [["task:sums", 3.0]]}})
    with pytest.raises(PlanError, match="Curriculum orders the rows of the task, and the weights"):
        job({"Curriculum": {"by": "length"}})
