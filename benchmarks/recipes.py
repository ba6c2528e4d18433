"""Every shape of data, from its recipe to its report on a real model. Resumable: one JSON of a few kilobytes a shape.

    python benchmarks/recipes.py run --shared ../shared/data      # what is missing
    python benchmarks/recipes.py table                            # docs/recipes.md

SmolLM2-135M-Instruct and recipes/*.yaml as they are, but for the files and the lengths that stand in `SHAPES`: made
conversations and written answers (`leaderboard_talk`), the pages of docs/ as documents, made instructions beside the
shipped tickets, SST-2 and RTE from --shared (not shipped).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_shapes
import leaderboard_talk
from budget import end_of, interval, tuned
from leaderboard_plans import HERE, OUT

FOLDER, PAGE, RECIPES = OUT / "recipes", HERE.parent / "docs" / "recipes.md", HERE.parent / "recipes"
EIGHT = ["training.per_device_train_batch_size=8", "training.max_steps=60"]


@dataclass(frozen=True)
class Shape:
    """One recipe. about: its heading; data: makes its files in a folder and gives what of the recipe names them;
    also: what else is set, shown on the page."""

    about: str
    data: Callable[[Path, Path], Sequence[str]]
    also: Sequence[str] = ()


def talks(folder: Path, shared: Path) -> list[str]:
    train = leaderboard_talk.write(leaderboard_talk.tickets("train"), folder / "conversations.jsonl", test=False)
    test = leaderboard_talk.write(leaderboard_talk.tickets("test")[:120], folder / "test.jsonl", test=True)
    return [f"data.train={train}", f"data.test={test}"]


def answers(folder: Path, shared: Path) -> list[str]:
    """The last answer of each conversation, in one prompt."""
    rows = []
    for ticket in leaderboard_talk.tickets("train"):
        asked, first, reply, last = (m["content"] for m in leaderboard_talk.conversation(**ticket))
        rows.append({"prompt": f"{asked}\n{first}\n{reply}", "completion": last})
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return [f"data.train={folder / 'answers.jsonl'}"]


def documents(folder: Path, shared: Path) -> list[str]:
    """The prose of docs/, cut at headings so that there are enough documents to hold some out."""
    pages = [p for p in sorted(PAGE.parent.glob("*.md")) if p.name not in ("leaderboard.md", "methods.md", PAGE.name)]
    (folder / "documents").mkdir(exist_ok=True)
    for page in pages:
        for n, part in enumerate(page.read_text(encoding="utf-8").split("\n## ")):
            if len(part) > 400:
                (folder / "documents" / f"{page.stem}.{n:02}.md").write_text(part, encoding="utf-8")
    return [f"data.train={folder / 'documents'}"]


def large(folder: Path, shared: Path) -> list[str]:
    from holdfast.data.readers import DATA_DIR

    data_shapes.instructions(folder / "instructions.jsonl", 20_000)
    tickets = DATA_DIR / "tickets" / "train.jsonl"
    return [f"data.train.0.path={folder / 'instructions.jsonl'}", f"data.train.1.path={tickets}"]


def rows_of_tickets(folder: Path, shared: Path) -> list[str]:
    columns = ['data.prompt="{text}\\nQueue:"', 'data.completion=" {queue}"']
    return [*(f"data.{s}=holdfast:tickets/{s}.jsonl" for s in ("train", "validation", "test")), *columns]


def of_shared(task: str) -> Callable[[Path, Path], list[str]]:
    def paths(folder: Path, shared: Path) -> list[str]:
        return [f"data.{s}={shared / 'text' / task / f'{s}.jsonl'}" for s in ("train", "test")]

    return paths


SHAPES = {
    "sst2": Shape("Short rows with labels", of_shared("sst2"), EIGHT),
    "rte": Shape("Pairs of sentences", of_shared("rte"), EIGHT),
    "conversations": Shape("Conversations", talks, [*EIGHT, "data.metric=exact_match"]),
    "written_answers": Shape(
        "Written answers", answers, [*EIGHT, "training.eval_steps=20", "data.validation_size=60", "data.test_size=60",
                                     "measure.max_new_tokens=32"]),
    "documents": Shape("Documents", documents, ["training.max_steps=40", "data.max_length=512", "data.stride=64"]),
    "long_context": Shape("Long documents", documents, ["training.max_steps=6", "data.max_length=1024",
                                                         "training.gradient_accumulation_steps=4"]),
    "large": Shape("A large set beside a small one", large, [*EIGHT, "data.validation_size=0.1"]),
    "small_model": Shape("All weights of a small model", rows_of_tickets, ["training.max_steps=12"]),
}  # fmt: skip


def run(name: str, shared: Path, work: Path) -> None:
    """One run of `tune`, its report in short."""
    from holdfast.files import write_json
    from holdfast.recipe import load_recipe

    shape, out = SHAPES[name], work / name
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        told = [*shape.data(Path(folder), shared), *shape.also, f"training.output_dir={out}"]
        found, report = tuned(load_recipe(RECIPES / f"{name}.yaml", told), out)
    task, training = report["task"], report["training"]
    found |= {
        "tune_seconds": report["timing"]["tune"],
        "steps": training["steps"],
        "rows": report["data"]["rows"],
        "task": {k: task[k] for k in ("metric", "before", "after", "lower") if k in task},
        "end": {k: training["budget"][k] for k in ("share", "healed", "met")} if training["budget"] else None,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / f"{name}.json", found)
    shutil.rmtree(out)


# ---- the page

INTRO = """<!-- Written by benchmarks/recipes.py: change the code and run it again. -->

# Recipes

One for each shape of data, with what came of it on SmolLM2-135M-Instruct. They lie in the folder `recipes/`;
`holdfast init FILE` writes one for a file of yours, [recipe](recipe.md) has every key and [data](data.md) has what
each shape becomes. They were run as they stand, but for the files and what is said below each; one seed, one thread
of a busy machine of two cores. Task and abilities are measured on rows and items that chose nothing; in brackets:
95 % intervals. `end`: what of the change met the [budget](budget.md).

"""


def _end(end: Mapping[str, Any] | None) -> str:
    if not end:
        return "no budget"
    return end_of(end) + (", not met" if end["met"] is False else "")


def page() -> str:
    """docs/recipes.md."""
    out = INTRO.splitlines()
    for name, shape in SHAPES.items():
        path = FOLDER / f"{name}.json"
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").rstrip()
        out += [f"## {shape.about}", "", "```yaml", text, "```", ""]
        if not path.is_file():
            out += ["Not run yet.", ""]
            continue
        f = json.loads(path.read_text(encoding="utf-8"))
        digits = 2 if f["task"]["metric"] in ("chrF", "ROUGE-L") else 3
        names = [n for n, k in f["kept"].items() if "value" in k]
        unseen = [n for n, k in f["kept"].items() if "value" not in k]
        head = [f["task"]["metric"], "before", "after", *(f"{n} kept" for n in names), "end", "steps", "seconds"]
        cells = [
            "",
            interval(f["task"]["before"], digits),
            interval(f["task"]["after"], digits),
            *(f"{interval(f['kept'][n], 2)}, {f['kept'][n]['status']}" for n in names),
            _end(f["end"]),
            f["steps"],
            f"{f['tune_seconds']:.0f} of {f['seconds']:.0f}",
        ]
        out += [f"| {' | '.join(head)} |", "|" + "---|" * len(head), f"| {' | '.join(map(str, cells))} |", ""]
        more = ", ".join(f"`{s}`" for s in shape.also)
        said = f"{f['rows']:,} rows; run with {more}."
        if unseen:
            said += f" Not shown to be there in the base: {', '.join(unseen)}."
        out += [said, ""]
    return "\n".join(out).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "recipes")
    parser.add_argument("--only", nargs="*", default=list(SHAPES), choices=SHAPES)
    args = parser.parse_args()
    if args.what == "run":
        for name in args.only:
            if not (FOLDER / f"{name}.json").exists():
                print(name, flush=True)
                run(name, args.shared.resolve(), args.work.resolve())
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
