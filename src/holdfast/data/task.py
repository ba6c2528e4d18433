"""The user's task: rows read and checked before anything long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.metric import check_rows, chosen
from holdfast.data.own_metric import load_function
from holdfast.data.rows import Row, cap, check_labels, labels_of, leaks, read_rows, split
from holdfast.data.tokens import Encoder, tokenize_all
from holdfast.engine.pack import TokenRow
from holdfast.errors import DataError
from holdfast.recipe import Recipe


@dataclass(frozen=True)
class TaskData:
    """The rows of one task.

    labels: the closed set of completions, or None for free text. metric: its name (`data.metric.metric_of`).
    """

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...] | None
    token_rows: tuple[TokenRow, ...]
    metric: str
    note: str = ""

    @property
    def chance(self) -> float | None:
        """Accuracy of always giving the most frequent test label; None where the metric knows no guessing."""
        if self.metric != "accuracy" or not self.labels:
            return 0.0 if self.metric == "exact_match" else None
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
    metric = chosen(spec.metric, labels)
    if ":" in metric:
        load_function(metric, base_dir)  # what is wrong with it shows now
    closed = labels if metric == "accuracy" else None
    for rows in (validation or [], test):
        check_labels(closed, rows)
        check_rows(metric, rows)
    train, test = cap(train, spec.train_size, seed), cap(test, spec.test_size, seed)
    if not test:
        raise DataError(f"The test split of {spec.name} is empty.", "Give data.test or data.validation_size.")
    shared = leaks(train, test)
    if shared:
        notes.append(f"{shared} test prompts also stand in train")
    most = min(spec.max_length, longest)
    tokens = tuple(tokenize_all(train, tokenizer, most, stops=stops, notes=notes))
    tokenize_all([*(validation or ()), *test], tokenizer, most, stops=stops)
    encoder = Encoder(tokenizer, stops)
    _check_told_apart(train, closed, encoder)
    if encoder.ends_texts:
        notes.append("the tokenizer ends every text, prompts too; here it ends answers only, as in the exported one")
    return TaskData(
        spec.name,
        tuple(train),
        tuple(validation or ()),
        tuple(test),
        labels,
        tokens,
        metric,
        "; ".join(dict.fromkeys(notes)),
    )


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
