"""The user's task: rows read, checked and tokenised before anything long; once for the same content.

What a start needs of 100,000 rows takes seconds the first time and is on disk afterwards, under a name made of all
that decides it. So a start that finds it reads and checks nothing again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.data.content import content_of
from holdfast.data.metric import chosen
from holdfast.data.own_metric import load_function
from holdfast.data.prepare import Prepared, prepare
from holdfast.data.rendered import Rendered, is_chat
from holdfast.data.rows import Row
from holdfast.data.store import Texts, Tokens, open_texts
from holdfast.engine.pack import TokenRow
from holdfast.files import cache_dir, fresh_folder, newest
from holdfast.recipe import Recipe

DONE, MOST_KEPT = "task.json", 16  # what tells a whole folder; prepared tasks in the cache


@dataclass(frozen=True)
class TaskData:
    """The rows of one task; those of training lie on disk.

    Attributes:
        labels: the closed set of completions, or None for free text.
        names: what the labels say, without the end that a chat template writes behind them; empty for free text.
        key: identity of the training and test rows, by content.
        metric: its name (`data.metric.metric_of`).
        note: what is no error and must be said.
    """

    name: str
    train: Sequence[Row]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...] | None
    names: tuple[str, ...]
    token_rows: Tokens
    key: str
    metric: str
    note: str = ""
    _all: Texts | None = None
    _keeps: Any = None  # a folder that goes when the task does

    @property
    def chance(self) -> float | None:
        """Accuracy of always giving the most frequent test label; None where the metric knows no guessing."""
        if self.metric != "accuracy" or not self.labels:
            return 0.0 if self.metric == "exact_match" else None
        given = [r.completion for r in self.test]
        return max(given.count(y) for y in self.labels) / len(given)

    @property
    def chat(self) -> bool:
        """Whether its rows are written by the model's chat template."""
        return is_chat(self.validation) or is_chat(self.test)

    def place(self, row: TokenRow) -> str:
        """Where a training row stands in its file; "" for one that a method made or changed."""
        number = self.token_rows.find(row)
        return "" if number is None or self._all is None else self._all.only([number])[0].where


def read_task(
    recipe: Recipe,
    tokenizer: Any,
    base_dir: Path,
    longest: int,
    stops: Sequence[int] = (),
    tell: Callable[[str], None] | None = None,
) -> TaskData:
    """Read, cut, check and tokenise the task's data; every fault is found here, before any long work.

    longest: positions the model reads; stops: tokens that end its generation, beside the tokenizer's own; tell: hears
    how far it is.
    """

    if ":" in (recipe.data.metric or ""):
        load_function(str(recipe.data.metric), base_dir)  # what is wrong with it shows now

    def go(folder: Path) -> None:
        found = prepare(folder, recipe, tokenizer, base_dir, longest, stops, tell)
        _write(folder, found)

    key = content_of(recipe, tokenizer, base_dir, [longest, *stops])
    if key is None:
        kept = tempfile.TemporaryDirectory(dir=cache_dir(), prefix="rows-")
        go(Path(kept.name))
        return _opened(Path(kept.name), recipe.data.name, kept)
    folder = cache_dir() / "rows" / key
    if not (folder / DONE).is_file():
        with fresh_folder(folder, replace=False) as part:
            go(part)
        newest(folder.parent, MOST_KEPT)
    return _opened(folder, recipe.data.name, None)


def _write(folder: Path, found: Prepared) -> None:
    np.save(folder / "train.npy", np.asarray(found.train, dtype=np.int64))
    said: dict[str, Any] = {n: [_plain(row) for row in getattr(found, n)] for n in ("validation", "test")}
    said |= {name: getattr(found, name) for name in ("labels", "names", "key", "metric")}
    said["note"] = "; ".join(dict.fromkeys(found.notes))
    (folder / DONE).write_text(json.dumps(said), encoding="utf-8")


def _plain(row: Row) -> list[Any]:
    return [row.prompt, row.completion, row.source, row.where, isinstance(row.prompt, Rendered), row.ends]


def _row(prompt: str, completion: str, source: str, where: str, rendered: bool, ends: bool) -> Row:
    return Row(Rendered(prompt) if rendered else prompt, completion, source, where, ends=ends)


def _opened(folder: Path, name: str, keeps: Any) -> TaskData:
    """The task that a folder holds."""
    said, train = json.loads((folder / DONE).read_text(encoding="utf-8")), np.load(folder / "train.npy")
    texts, tokens = open_texts(folder), Tokens(folder)
    ours = np.flatnonzero(np.isin(tokens.of, train))
    labels = None if said["labels"] is None else tuple(said["labels"])
    return TaskData(
        name,
        texts.only(train),
        tuple(_row(*row) for row in said["validation"]),
        tuple(_row(*row) for row in said["test"]),
        labels,
        tuple(said["names"]),
        Tokens(folder, chosen=ours),
        said["key"],
        chosen(said["metric"], labels),  # its package may be gone
        said["note"],
        texts,
        keeps,
    )
