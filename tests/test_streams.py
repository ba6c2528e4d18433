"""Streaming: of a set that is too large, as many rows as the run needs; the rest is never read."""

import json
from collections import Counter
from itertools import count, islice
from pathlib import Path

import pytest

from holdfast.data import streams
from holdfast.data.content import content_of
from holdfast.data.streams import rows_wanted, shuffled
from holdfast.data.task import read_task
from holdfast.errors import RecipeError
from holdfast.recipe import recipe_from
from tiny_run import recipe_data


@pytest.fixture
def numbers(tmp_path):
    """A file of 400 rows, and behind them one that cannot be read."""
    rows = [json.dumps({"text": f"What is {n}?", "queue": f"{n % 3}"}) for n in range(400)]
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join([*rows, "{broken"]), encoding="utf-8")
    return path


def recipe(world, tmp_path, path, data=None, **training):
    source = {"path": str(path), "streaming": True}
    told = recipe_data(world, tmp_path / "run", data={"train": source, **(data or {})}, training=training)
    return recipe_from(told)


def test_a_buffer_mixes_and_reads_no_further(monkeypatch):
    monkeypatch.setattr(streams, "BUFFER", 10)
    source = count()
    drawn = list(shuffled(source, 100, seed=1))
    assert sorted(drawn) == list(range(100)) and next(source) == 100
    assert drawn != sorted(drawn) and all(n <= at + 10 for at, n in enumerate(drawn))
    assert drawn == list(shuffled(count(), 100, seed=1)) != list(shuffled(count(), 100, seed=2))
    assert sorted(shuffled(range(4), 100, seed=1)) == [0, 1, 2, 3]
    assert list(islice(shuffled(count(), 1 << 60, seed=1), 3))  # nobody waits for an end


def test_as_many_rows_are_read_as_the_run_draws(world, tmp_path, tokenizer, numbers, monkeypatch):
    monkeypatch.setattr(streams, "BUFFER", 50)
    small = recipe(
        world, tmp_path, numbers, max_steps=40, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert rows_wanted(small, small.data.sets("train")[0]) == 160 + 6
    task = read_task(small, tokenizer, tmp_path, 512)
    assert len(task.train) == 160 and len(task.test) == 6
    assert "the first 166 rows of numbers are streamed, and no others read" in task.note
    at = [int(row.where.split(":")[1]) for row in task.train]
    assert max(at) <= 166 and at != sorted(at)
    assert [r.where for r in read_task(small, tokenizer, tmp_path, 512).train] == [r.where for r in task.train]


def test_rows_that_are_left_out_are_not_read_anew(world, tmp_path, tokenizer):
    """And that is said, unless the stream was at its end."""
    path = tmp_path / "some.jsonl"
    rows = [{"text": f"What is {n}?" + " Or what is it?" * (n % 4 == 0) * 30, "queue": f"{n % 3}"} for n in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"max_length": 64, "metric": "loss"}
    task = read_task(recipe(world, tmp_path, path, data, max_steps=15), tokenizer, tmp_path, 512)
    lost = 60 - len(task.train)
    assert lost > 5 and f"{lost} of 60 streamed rows are left out; no others are read for them" in task.note
    task = read_task(recipe(world, tmp_path, path, data, max_steps=40), tokenizer, tmp_path, 512)
    assert len(task.train) < 80 and "streamed rows are left out" not in task.note


def test_the_library_streams_folders_and_the_hub(world, tmp_path, tokenizer, numbers):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines = numbers.read_text(encoding="utf-8").splitlines()[:400]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = read_task(recipe(world, tmp_path, tmp_path / "set", max_steps=10), tokenizer, tmp_path, 512)
    assert len(task.train) == 40 and task.train[0].where.startswith(f"{tmp_path / 'set'}[train]:")


def test_how_many_rows_are_wanted(world, tmp_path, numbers):
    def wanted(data=None, **training):
        made = recipe(world, tmp_path, numbers, data, **training)
        return [rows_wanted(made, one) for one in made.data.sets("train")]

    assert wanted({"validation_size": 0.2}, max_steps=20) == [80 + 20]
    assert wanted({"validation_size": None}, max_steps=9000) == [36_000 + 500]
    assert wanted({"validation_size": None, "validation": str(numbers)}, max_steps=20) == [80]
    assert wanted({"train_size": 30}, max_steps=-1) == [36]
    two = [{"path": str(numbers), "weight": 1, "streaming": True}, {"path": "b.jsonl", "weight": 3}]
    assert wanted({"train": two, "validation_size": 0.2}, max_steps=20) == [25, None]


def test_what_streaming_needs_is_asked_for(world, tmp_path, numbers):
    with pytest.raises(RecipeError, match=r"training\.max_steps or data\.train_size beside streaming"):
        recipe(world, tmp_path, numbers, max_steps=-1)
    with pytest.raises(RecipeError, match="no streaming, for only sets to train on"):
        recipe(world, tmp_path, numbers, {"test": {"path": "x.jsonl", "streaming": True}})
    with pytest.raises(RecipeError, match="weights beside streaming"):
        recipe(world, tmp_path, numbers, {"train": [{"path": "a.jsonl", "streaming": True}, "b.jsonl"]})


def test_a_commit_of_the_hub_is_content(world, tmp_path, tokenizer):
    def key(**source):
        told = recipe_data(world, tmp_path / "run", data={"train": {"path": "some/set", **source}})
        return content_of(recipe_from(told), tokenizer, Path(tmp_path), [])

    found = Counter(key(revision=letter * 40) for letter in "aab")
    assert key() is None and key(revision="main") is None and sorted(found.values()) == [1, 2]
