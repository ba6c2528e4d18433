"""The sets of a role (to train on, to validate, to test): what their rows and files are called, and how much of each.

One set is "task", as it always was. The rows of several are "task:" and the name of their set, wherever rows are told
apart by where they come from: in the report, in the realised mix, and by methods that balance sources.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from holdfast.data.readers import source_file
from holdfast.data.rows import cap
from holdfast.data.shares import TASK, quotas
from holdfast.recipe import Data, Source

Item = TypeVar("Item")


@dataclass(frozen=True)
class Set:
    """One set as it is read.

    Attributes:
        name: of its rows (`Row.source`).
        prompt, completion: its templates, or None.
        shown: what places call its file, where the name of the file alone would not tell it from another.
    """

    source: Source
    name: str
    prompt: str | None
    completion: str | None
    shown: str | None


def sets_of(data: Data, role: str, base_dir: Path) -> list[Set]:
    """The sets of a role. A set without templates takes those of the training set with its name, else `data`'s own."""
    found, shown = data.sets(role), _shown(data.sets(role), base_dir)
    several = any(isinstance(getattr(data, r), list) for r in ("train", role))
    return [
        Set(source, f"{TASK}:{source.title}" if several else TASK, *_templates(source, data), name)
        for source, name in zip(found, shown, strict=True)
    ]


def _templates(source: Source, data: Data) -> tuple[str | None, str | None]:
    train = data.sets("train")
    like = [one for one in train if one.title == source.title] if len(train) > 1 else list(train)
    for one in (source, *like):
        if one.prompt is not None:
            return one.prompt, one.completion
    return data.prompt, data.completion


def _shown(sources: Sequence[Source], base_dir: Path) -> list[str | None]:
    """For files and folders that share their names with others, the path from the folder that holds them all."""
    if len(sources) < 2:
        return [None] * len(sources)
    paths = [source_file(source, base_dir) for source in sources]
    there = [path for path in paths if path]
    top = os.path.commonpath([path.parent for path in there]) if there else ""
    alike = len({path.name for path in there}) < len(set(there))
    return [
        Path(os.path.relpath(path, top)).as_posix() if path and (alike or path.is_dir()) else _hub_name(source, path)
        for source, path in zip(sources, paths, strict=True)
    ]


def _hub_name(source: Source, path: Path | None) -> str | None:
    return f"{source.path}/{source.name}" if path is None and source.name else None


# ---- how much of each


def draw(
    items: Sequence[Item],
    name_of: Callable[[Item], str],
    count: int | None,
    seed: int,
    what: str,
    parts: Callable[[Mapping[str, int], int, str], dict[str, int]] = quotas,
) -> list[Item]:
    """Draw `count` items by seed (None, or more than there are: all); parts: of each set (`quotas`: by its size)."""
    groups = grouped(items, name_of)
    if count is None or len(groups) < 2:
        return cap(items, count, seed)
    sizes = {name: len(group) for name, group in groups.items()}
    given = parts(sizes, count, what) if count < len(items) else sizes
    drawn = [item for name, group in groups.items() for item in cap(group, min(given[name], len(group)), seed)]
    random.Random(seed).shuffle(drawn)
    return drawn


def grouped(items: Sequence[Item], name_of: Callable[[Item], str]) -> dict[str, list[Item]]:
    """The items of each set, sets by first appearance."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(name_of(item), []).append(item)
    return groups
