"""init: a commented recipe for a data file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from holdfast.data.propose import Proposal, propose
from holdfast.errors import RecipeError
from holdfast.files import write_text
from holdfast.recipe import SCHEMA_FILE, Source, default_name, load_recipe, locate

OTHERS: dict[str, tuple[str, ...]] = {
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}  # files beside the training file
TRAIN = "train"  # the split of a hub set
WHY = {"number": "each answer is a number", "loss": "free answers", "loss_per_byte": "plain text"}
METRICS = "accuracy, exact_match, loss, loss_per_byte, chrf, rouge_l, number, module:function, command: PROGRAM"


def init(data: Sequence[str], out: Path, model: str) -> list[Proposal]:
    """Write a recipe for `data` (files, folders, hub ids, holdfast:<shipped>) to `out`; gives what was found in each.

    Raises:
        HoldfastError: `out` exists, or the data cannot be used.
    """
    if out.exists():
        raise RecipeError(f"{out} exists.", "Give another file with -o, or remove it.")
    found = [locate(one, Path.cwd()) for one in data]
    sources = [_source(one, path) for one, path in zip(data, found, strict=True)]
    proposals = [propose(source, Path.cwd()) for source in sources]
    names = [_named(one, path, out) for path, one in zip(found, data, strict=True)]
    if len(data) == 1:
        lines = _one(names[0], sources[0].split, _beside(found[0], out), proposals[0])
        name = default_name(names[0])
    else:
        lines = _several(names, sources, proposals)
        name = "-".join(map(default_name, names))
    write_text(out, _text(lines, name, model))
    load_recipe(out)  # what we wrote must be a recipe
    return proposals


def command(data: Sequence[str], out: Path, model: str) -> None:
    """`holdfast init`."""
    for found in init(data, out, model):
        columns = ", ".join(found.columns)
        print(f"{found.rows}{'' if found.whole else ' or more'} rows with the columns {columns}.")
    print(f"{out} is written. Look through it, then: holdfast explain {out} --rows 3")


def _source(data: str, found: Path | None) -> Source:
    """Of a hub set its train split: most have several, and one must be named."""
    hub = found is None and not data.startswith("holdfast:")
    return Source(path=str(found or data), split=TRAIN if hub else None)


def _named(data: str, found: Path | None, out: Path) -> str:
    """The data as the recipe names it: a file relative to the recipe."""
    return Path(os.path.relpath(found, out.absolute().parent)).as_posix() if found else data


def _beside(found: Path | None, out: Path) -> dict[str, str]:
    """validation and test files beside train.<kind>."""
    if found is None or not found.is_file() or found.stem not in ("train", "training"):
        return {}
    out_of = {role: [found.with_name(n + found.suffix) for n in names] for role, names in OTHERS.items()}
    there = {role: next((p for p in paths if p.is_file()), None) for role, paths in out_of.items()}
    return {role: _named("", path, out) for role, path in there.items() if path}


def _quoted(text: str) -> str:
    """One line of YAML."""
    style = '"' if "\n" in text or "{" in text else None
    return yaml.safe_dump(text, default_style=style, width=10_000, allow_unicode=True).split("\n")[0]


def _rows(found: Proposal) -> str:
    return _line(f"{found.rows}{'' if found.whole else ' or more'} rows; columns: {', '.join(found.columns)}")


def _several(names: Sequence[str], sources: Sequence[Source], proposals: Sequence[Proposal]) -> list[str]:
    """The lines under `train` of several sets, each with templates of its own."""
    data = ["  train:  # several sets; `weight` on each would say how often its rows come, by size without"]
    for name, source, found in zip(names, sources, proposals, strict=True):
        data.append(f"    - path: {_quoted(name)}  # {_rows(found)}")
        data += [f"      split: {source.split}"] * bool(source.split)
        if not found.schema:
            data += [
                f"      prompt: {_quoted(found.prompt or '')}",
                f"      completion: {_quoted(found.completion or '')}",
            ]
        data += [f"      {line}" for line in _left_out(found)]
    metrics = {found.metric for found in proposals}
    metric = metrics.pop() if len(metrics) == 1 else "loss"
    cut = "  # validation_size: 0.05  # cut from each set; without it a tenth, at most test_size (500) in all"
    return [*data, cut, *_last(metric, "for all sets")]


def _left_out(found: Proposal) -> list[str]:
    """A comment on the columns that the templates do not name."""
    return [f"# left out: {_line(', '.join(found.left_out))}"] if found.left_out else []


def _last(metric: str, why: str) -> list[str]:
    return [f"  metric: {metric}  # {why}; also {METRICS}", "  max_length: 1024  # tokens of the longest row"]


def _one(train: str, split: str | None, beside: dict[str, str], found: Proposal) -> list[str]:
    path = f"{{path: {_quoted(train)}, split: {split}}}" if split else _quoted(train)
    data = [f"  name: {_quoted(default_name(train))}", f"  train: {path}  # {_rows(found)}"]
    data += [f"  {role}: {_quoted(path)}" for role, path in beside.items()]
    if "validation" not in beside:
        data.append("  # validation_size: 200  # cut from train; without it a tenth, at most test_size (500)")
    if "test" not in beside:
        data.append("  # test: test.jsonl  # without one the validation rows are reported")
    if found.schema:
        data.append(f"  # the columns are those of the schema {found.schema}: no templates are needed")
    else:
        data += [f"  prompt: {_quoted(found.prompt or '')}", f"  completion: {_quoted(found.completion or '')}"]
        data += [f"  {line}" for line in _left_out(found)]
    why = f"a closed set of {found.labels} answers" if found.labels else WHY[found.metric]
    return [*data, *_last(found.metric, why)]


def _text(data: Sequence[str], name: str, model: str) -> str:
    return "\n".join([
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# What is not said has a default; `holdfast recipe` lists every key.",
        "model:",
        f"  model_name_or_path: {_quoted(model)}  # hub id, folder, PEFT adapter or GGUF file",
        "data:",
        *data,
        "training:",
        f"  output_dir: runs/{name}",
        "  learning_rate: auto  # from what trains and the width of the model; or a number",
        "  per_device_train_batch_size: 16",
        "  num_train_epochs: 1",
        "  # eval_steps: 50  # look at validation rows and a cheap probe of the abilities",
        "  # load_best_model_at_end: true",
        "  # report_to: tensorboard  # or trackio, wandb, mlflow; offline unless told else",
        "# plan:  # without it the default plan: LoRA and ICLAnchor",
        "#   - LoRA: {r: 16}",
        "#   - ICLAnchor",
        "measure:",
        "  suites: [auto]  # in-context, and more where the training is long; `holdfast suites` lists them",
        "  # keep: {in-context: 0.97}  # share of the base's score that must stay; what breaks it is healed",
        "",
    ])  # fmt: skip


def _line(text: str) -> str:
    """Text for a comment: one line, whatever a column is called."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
