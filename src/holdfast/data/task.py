"""The user's task: rows read and checked before anything long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from holdfast.data.encoder import Encoder
from holdfast.data.lengths import Limit
from holdfast.data.notes import Notes
from holdfast.data.rows import Row, cap, check_labels, labels_of, leaks, read_rows, split
from holdfast.data.tokens import tokenize_each
from holdfast.engine.pack import TokenRow
from holdfast.errors import DataError
from holdfast.recipe import Recipe


@dataclass(frozen=True)
class TaskData:
    """The rows of one task. `labels` is the closed set of completions, or None for free text."""

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...] | None
    token_rows: tuple[TokenRow, ...]
    places: tuple[str, ...] = ()
    note: str = ""

    def place(self, row: TokenRow) -> str:
        """Where a training row stands in its file; "" for one that a method made or changed."""
        return next((where for one, where in zip(self.token_rows, self.places, strict=True) if one is row), "")

    @property
    def metric(self) -> str:
        return "accuracy" if self.labels else "exact match"

    @property
    def chance(self) -> float:
        """Accuracy of always giving the most frequent test label."""
        if not self.labels:
            return 0.0
        given = [r.completion for r in self.test]
        return max(given.count(y) for y in self.labels) / len(given)


def read_task(recipe: Recipe, tokenizer: Any, base_dir: Path, longest: int, stops: Sequence[int] = ()) -> TaskData:
    """Read, cut, check and tokenise the task's data; every fault is found here, before any long work.

    longest: positions the model reads; stops: tokens that end its generation, beside the tokenizer's own.
    """
    spec, seed = recipe.data, recipe.training.data_seed
    seed = recipe.training.seed if seed is None else seed

    notes: list[str] = []

    def read(source: Any) -> list[Row]:
        return read_rows(
            source,
            prompt=spec.prompt,
            completion=spec.completion,
            base_dir=base_dir,
            tokenizer=tokenizer,
            notes=notes,
            last_only=spec.train_on == "last",
        )

    train = read(spec.train)
    labels = labels_of(train)
    validation = read(spec.validation) if spec.validation else None
    test = read(spec.test) if spec.test else None
    if validation is None and spec.validation_size:
        train, validation = split(train, spec.validation_size, seed)
    if test is None:
        test = validation or []
        notes.append("no test set was given: the validation rows are reported")
    for rows in (validation or [], test):
        check_labels(labels, rows)
    train, test = cap(train, spec.train_size, seed), cap(test, spec.test_size, seed)
    if not test:
        raise DataError(f"The test split of {spec.name} is empty.", "Give data.test or data.validation_size.")
    shared = leaks(train, test)
    if shared:
        notes.append(f"{shared} test prompts also stand in train")
    encoder, most = Encoder(tokenizer, stops), min(spec.max_length, longest)
    limit = Limit(most, spec.too_long, spec.stride or most // 8)
    train, made = _tokenized(train, encoder, limit, notes, all_tokens=spec.train_on == "all")
    tokens = tuple(chain.from_iterable(made))
    asked = limit if spec.too_long in ("refuse", "drop") else Limit(longest, "drop")
    validation, test = (
        _fitting(rows, encoder, asked, notes, of) for rows, of in ((validation or [], "validation"), (test, "test"))
    )
    _check_told_apart(train, labels, encoder)
    if encoder.ends_texts:
        notes.append("the tokenizer ends every text, prompts too; here it ends answers only, as in the exported one")
    return TaskData(
        spec.name,
        tuple(train),
        tuple(validation),
        tuple(test),
        labels,
        tokens,
        tuple(row.where for row, some in zip(train, made, strict=True) for _ in some),
        "; ".join(dict.fromkeys(notes)),
    )


def _tokenized(
    rows: Sequence[Row], encoder: Encoder, limit: Limit, notes: list[str], **kind: Any
) -> tuple[list[Row], list[list[TokenRow]]]:
    """The rows that stay, and the token rows of each."""
    odd = Notes()
    made = tokenize_each(rows, encoder, limit, odd, **kind)
    kept = [row for row, some in zip(rows, made, strict=True) if some]
    limit.check_left(len(kept), len(rows))
    notes += odd.lines()
    return kept, [some for some in made if some]


def _fitting(rows: Sequence[Row], encoder: Encoder, limit: Limit, notes: list[str], which: str) -> list[Row]:
    """The rows that are asked in the end: never a part of one, and what is left out is said."""
    kept, _ = _tokenized(rows, encoder, limit, [])
    if len(kept) < len(rows):
        notes.append(
            f"{len(rows) - len(kept)} of {len(rows)} {which} rows are longer than {limit.most} tokens, left out"
        )
    return kept


def _check_told_apart(rows: Sequence[Row], labels: Sequence[str] | None, encoder: Encoder) -> None:
    """Raise DataError for two labels that are the same tokens (a lower-casing tokenizer, characters it lacks)."""
    written = encoder.join([(rows[0].prompt, label) for label in labels or ()], end=True)
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(labels or (), written, strict=True):
        twin = seen.setdefault(tuple(tokens.answer), label)
        if twin != label:
            what = (
                f"The labels {twin!r} and {label!r} are the same tokens for this tokenizer, so no model can tell them."
            )
            raise DataError(what, "Rename one of them, or use a model whose tokenizer writes both.")
