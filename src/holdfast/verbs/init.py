"""init: a commented recipe for a data file."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from holdfast.data.propose import Proposal, propose
from holdfast.errors import RecipeError
from holdfast.files import write_text
from holdfast.recipe import SCHEMA_FILE, Source, _default_name, load_recipe, locate

OTHERS: dict[str, tuple[str, ...]] = {
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}  # files beside the training file
METRICS = "accuracy, exact_match, loss, loss_per_byte, chrf, rouge_l, number, module:function"


def init(data: str, out: Path, model: str) -> Proposal:
    """Write a recipe for `data` (file, folder, hub id or holdfast:<shipped>) to `out`; gives what was found.

    Raises:
        HoldfastError: `out` exists, or the data cannot be used.
    """
    if out.exists():
        raise RecipeError(f"{out} exists.", "Give another file with -o, or remove it.")
    found = locate(data, Path.cwd())
    proposal = propose(Source(path=str(found or data)), Path.cwd())
    write_text(out, _text(_named(data, found, out), _beside(found, out), proposal, model))
    load_recipe(out)  # what we wrote must be a recipe
    return proposal


def command(data: str, out: Path, model: str) -> None:
    """`holdfast init`."""
    found = init(data, out, model)
    columns = ", ".join(found.columns)
    print(f"{found.rows}{'' if found.whole else ' or more'} rows with the columns {columns}.")
    print(f"{out} is written. Look through it, then: holdfast explain {out} --rows 3")


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


def _text(train: str, beside: dict[str, str], found: Proposal, model: str) -> str:
    rows = f"{found.rows}{'' if found.whole else ' or more'} rows; columns: {', '.join(found.columns)}"
    data = [f"  name: {_quoted(_default_name(train))}", f"  train: {_quoted(train)}  # {_line(rows)}"]
    data += [f"  {role}: {_quoted(path)}" for role, path in beside.items()]
    if "validation" not in beside:
        data.append("  validation_size: 0.1  # cut from train")
    if "test" not in beside:
        data.append("  # test: test.jsonl  # without one the validation rows are reported")
    if found.schema:
        data.append(f"  # the columns are those of the schema {found.schema}: no templates are needed")
    else:
        data += [f"  prompt: {_quoted(found.prompt or '')}", f"  completion: {_quoted(found.completion or '')}"]
    why = f"a closed set of {found.labels} answers" if found.labels else "free answers"
    why = "each answer is a number" if found.metric == "number" else why
    data += [f"  metric: {found.metric}  # {why}; also {METRICS}", "  max_length: 1024  # tokens of the longest row"]
    name = _default_name(train)
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
        "  suites: [in-context]  # `holdfast suites` lists them",
        "  keep: {in-context: 0.95}  # share of the base's score that must be kept",
        "",
    ])  # fmt: skip


def _line(text: str) -> str:
    """Text for a comment: one line, whatever a column is called."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
