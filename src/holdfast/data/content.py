"""A name for all that decides what a recipe's rows become: files, settings, tokenizer, versions and our own code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from holdfast.data.readers import source_file
from holdfast.data.streams import rows_wanted
from holdfast.files import content_key
from holdfast.recipe import ROLES, Recipe, Source
from holdfast.versions import code_of, versions


def content_of(recipe: Recipe, tokenizer: Any, base_dir: Path, more: Sequence[Any]) -> str | None:
    """The name; None where the content of a source is not known without reading it (the hub)."""
    spec = recipe.data
    sources = [[_source(one, base_dir) for one in spec.sets(role)] for role in ROLES]
    if any(None in found for found in sources):
        return None
    wanted = [rows_wanted(recipe, one) for one in spec.sets("train")]
    told = spec.model_dump(exclude={"name", *ROLES})
    several = [isinstance(getattr(spec, role), list) for role in ROLES]
    decided = [sources, wanted, several, told, recipe.seed_of_rows, list(more)]
    return content_key(*decided, _tokenizer(tokenizer), versions(), code_of("data", "recipe"))


def _source(source: Source, base_dir: Path) -> list[str] | None:
    """A file's name, which messages and rows carry, and its content; of a folder, all files'."""
    path = source_file(source, base_dir)
    if path is None:
        fixed = re.fullmatch("[0-9a-f]{40}", source.revision or "")  # a commit: the same rows for ever
        return [source.path, source.model_dump_json()] if fixed else None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [source.path, source.model_dump_json(), *(f"{p.name} {_digest(p)}" for p in files)]


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _tokenizer(tokenizer: Any) -> list[Any]:
    """What a tokenizer makes of a text, by content."""
    inside = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    settings = sorted((key, str(value)) for key, value in tokenizer.init_kwargs.items())
    names = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    kind = [type(tokenizer).__module__, type(tokenizer).__qualname__, metadata.version("tokenizers")]
    return [inside, settings, names, str(tokenizer.chat_template), *kind]
