"""Names and limits that a recipe and what reads it share, and where its files are looked for."""

import os
import re
from pathlib import Path
from string import Formatter

from holdfast.errors import DataError

KEEP_FRAC = 0.95
KEEP_IN_CONTEXT = 0.97  # of `tune`
AUTO = "auto"  # of the suites: what the training makes cheap
GROUPS = frozenset({AUTO, "default", "all"})  # of suites, each with in-context among them
SHIPPED = "holdfast:"  # prefix of the data sets and recipes that come with the package
RECIPE_DIR = Path(__file__).parents[1] / "recipes"  # demo.yaml is holdfast:demo
TEXT_KINDS = (".txt", ".md")  # one document each
FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *TEXT_KINDS)
SCHEMA_FILE = RECIPE_DIR / "recipe.schema.json"  # json_schema(), written by tools/make_docs.py
METRIC_NAMES = ("accuracy", "exact_match", "loss", "loss_per_byte", "chrf", "rouge_l", "number")
OWN_METRIC = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # module:function
COMMAND = "command:"  # what stands before a program that judges answers
OLD_WARMUP = "warmup_ratio"
KEY_KINDS = ("extra_forbidden", "invalid_key")  # pydantic's names for "no such key"


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, in order. Only plain {column} fields are allowed.

    Raises:
        DataError: broken braces, or a field with an attribute, index, conversion or format.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"The template {template!r} is broken: {error}.", "Write {{ for a brace.") from None
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in fields:
        if not name or spec or conversion or re.search(r"[.\[\]{}]", name):
            what = f"The template {template!r} has a field that is more than a column name: {name!r}."
            raise DataError(what, "Only plain {column} fields are allowed; write {{ for a brace.")
    return tuple(dict.fromkeys(name for name, _, _ in fields))


def locate(path: str, base_dir: str | Path) -> Path | None:
    """Find a local file or folder, first beside the recipe (base_dir), then in the working directory."""
    if path.startswith(SHIPPED):
        return None
    for root in (Path(base_dir), Path.cwd()):
        found = root / os.path.expanduser(path)
        if found.exists():
            return Path(os.path.abspath(found))  # not resolve(): a linked file must keep its suffix
    return None


def default_name(path: str) -> str:
    """tickets for holdfast:tickets/train.jsonl and data/tickets.csv, sst2 for stanfordnlp/sst2."""
    plain = Path(path.removeprefix(SHIPPED))
    stem = plain.stem if plain.suffix in FILE_KINDS else plain.name
    generic = stem in ("train", "training", "data", "validation", "test") and plain.parent.name not in ("", "..")
    return re.sub(r"[^\w.-]+", "-", plain.parent.name if generic else stem).strip("-.") or "task"
