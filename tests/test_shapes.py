"""Every shape of data is a recipe under recipes/, and runs to its report on a tiny model."""

import json
import random
from pathlib import Path

import pytest

from holdfast.recipe import load_recipe
from holdfast.runs.run import Run
from holdfast.verbs.tune import go
from tiny import TICKETS

RECIPES = Path(__file__).parent.parent / "recipes"
TICKET = [(queue, text) for queue, texts in TICKETS.items() for text in texts]


@pytest.fixture
def shape(world, tmp_path):
    """shape(recipe, *overrides): the finished run of a recipe under recipes/, on the tiny model; its report."""

    def finished(name: str, *overrides: str) -> dict:
        small = ["training.max_steps=3", "training.per_device_train_batch_size=2", "measure.limit=2",
                 "measure.num_fewshot=1"]  # fmt: skip
        if load_recipe(RECIPES / f"{name}.yaml").plan is None:  # where it names methods, these are what is tried
            small += ["plan=[{LoRA: {r: 2}}]"]
        base = [f"model.model_name_or_path={world.base}", f"training.output_dir={tmp_path / 'run'}"]
        go(Run(load_recipe(RECIPES / f"{name}.yaml", [*base, *small, *overrides]), tmp_path))
        return json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))

    return finished


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(count: int, seed: int = 0) -> list[dict]:
    rng, made = random.Random(seed), []
    for _ in range(count):
        turns = []
        for queue, text in rng.sample(TICKET, rng.randint(2, 4)):
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": queue}]
        made.append({"messages": turns})
    return made


def test_conversations(shape, tmp_path):
    rows = conversations(24)
    rows[3]["messages"] = rows[3]["messages"] * 12  # far beyond max_length
    rows[5]["messages"][1]["train"] = False
    train = write(tmp_path / "talks.jsonl", rows)
    report = shape("conversations", f"data.train={train}", "data.max_length=160", "data.validation_size=6")
    assert "longer than data.max_length, cut at the beginning; the last answer is whole" in report["task"]["note"]
    assert "only the last answer" not in report["task"]["note"]
    for row in report["rows"][:3]:
        ends = [target for text, _, target, _ in row["tokens"] if text == "<|im_end|>"]
        marked = row["where"] == "talks.jsonl:6"
        assert ends == [n % 2 and not (marked and n == 1) for n in range(len(ends))]


@pytest.mark.parametrize("recipe", ["documents", pytest.param("long_context", marks=pytest.mark.long)])
def test_documents(recipe, shape, tmp_path):
    """A folder of texts, split with nothing lost; documents that are held out are measured."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for n in range(12):
        words = " ".join(text for _, text in random.Random(n).choices(TICKET, k=30 + n))
        (folder / f"{n:02}.{'md' if n % 2 else 'txt'}").write_text(words, encoding="utf-8")
    sizes = ["data.max_length=64", "data.stride=16", "data.validation_size=3"]
    report = shape(recipe, f"data.train={folder}", *sizes)
    assert "9 rows longer than data.max_length, split (first 00.txt:1)" in report["task"]["note"]
    assert report["task"]["metric"] == "loss per byte" and report["task"]["before"]["n"] == 3
    assert report["data"]["rows"] == 9 and report["rows"][0]["num_tokens"] == 64


def test_large(shape, tmp_path):
    """Two sets in their shares, the large one read as far as the run needs it."""
    said = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(400)]
    large = write(tmp_path / "instructions.jsonl", said)
    lines = ["text,queue", *(f'"{text}",{queue}' for queue, text in TICKET)]
    (tmp_path / "tickets.csv").write_text("\n".join(lines), encoding="utf-8")
    paths = [f"data.train.0.path={large}", f"data.train.1.path={tmp_path / 'tickets.csv'}"]
    report = shape("large", *paths, "training.max_steps=25", "data.validation_size=0.1")
    rows, drawn = ({s["name"]: s[key] for s in report["data"]["sets"]} for key in ("rows", "drawn"))
    assert rows == {"instructions": 41, "tickets": 22} and drawn["tickets"] in (9, 10, 11)
    assert sum(drawn.values()) == 50
    assert "the first 45 rows of instructions are streamed, and no others read" in report["task"]["note"]
    assert {s["name"]: s["after"]["n"] for s in report["task"]["sets"]} == {"instructions": 4, "tickets": 2}
    assert report["task"]["metric"] == "loss per token"


def test_written_answers(shape, tmp_path):
    """Answers are written and judged, looks choose the weights, and a tracker hears of it."""
    rows = [{"instruction": text, "output": f"Please send this to {queue}, who answer."} for queue, text in TICKET]
    train = write(tmp_path / "train.jsonl", rows)
    small = ["data.validation_size=4", "training.eval_steps=2", "measure.max_new_tokens=6", "training.save_steps=2",
             "measure.suites=[in-context]"]  # fmt: skip
    report = shape("written_answers", f"data.train={train}", *small)
    assert report["task"]["metric"] == "chrF" and report["task"]["after"]["n"] == 4
    assert [step for step, _ in report["training"]["looks"]["task"]] == [0, 2, 3]
    assert report["training"]["best_step"] in (0, 2, 3) and len(report["task"]["answers"]) == 4
    assert list((tmp_path / "run" / "trackers").rglob("events*"))


def test_all_weights_of_a_small_model(shape, tmp_path):
    rows = [{"prompt": text, "completion": f" {queue}"} for queue, text in TICKET]
    train = write(tmp_path / "train.jsonl", rows)
    report = shape("small_model", f"data.train={train}", "plan=[]", "training.gradient_accumulation_steps=2")
    assert report["plan"] == [] and "lr_scheduler_type: constant" in report["recipe"]


@pytest.mark.parametrize("name", ["sst2", "rte"])
def test_labelled_sentences(name, shape, tmp_path):
    """Recipes of files that are not shipped, on files with their columns."""
    rows = [{"sentence": text, "label": queue} for queue, text in TICKET]
    train, test = (write(tmp_path / f"{part}.jsonl", rows[k::2]) for k, part in enumerate(("train", "test")))
    report = shape(name, f"data.train={train}", f"data.test={test}", "data.train_size=10", "data.test_size=8")
    assert report["task"]["metric"] == "accuracy" and report["task"]["after"]["n"] == 8
    assert report["data"]["rows"] == 10


def test_every_recipe_has_a_test():
    """By its name in this file."""
    here = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in RECIPES.glob("*.yaml") if f'"{path.stem}"' not in here] == []
