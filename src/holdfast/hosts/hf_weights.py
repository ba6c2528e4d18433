"""Weights of a trainer's own rows: a column `weights` of a tokenised dataset, one number a token.

    loss = sum_t w_t * (-log p(y_t)) / number of targets

A collator has no place for them, so the column is taken off, and a batch's rows are found again by what they read and
where they are scored. What is no target has a label of -100, not a weight of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from holdfast.data.targets import weighed
from holdfast.engine.pack import WEIGHT, TokenRow
from holdfast.errors import DataError, PlanError
from holdfast.hosts.hf_batches import TENSORS, as_array, dataset_rows, row_of, rows_of

COLUMN = "weights"
LOOKED = 512  # rows that a collator is tried on
Weighed = Mapping[bytes, TokenRow]


def take_weights(given: dict[str, Any]) -> Weighed:
    """The rows of the training set that weigh other than 1, by key; their column is taken off the dataset.

    Raises:
        DataError: a target's weight is no number above 0, or not every token has one.
        PlanError: two rows of the same tokens have different weights, or the set is a stream.
    """
    dataset: Any = given.get("train_dataset")
    if not {"input_ids", COLUMN} <= _columns(dataset):
        return {}
    if not hasattr(dataset, "__len__"):
        what = f"The training set is a stream with a column {COLUMN!r}, and rows are found again among all of them."
        raise PlanError(what, "Give a dataset with a length.")
    found: dict[bytes, TokenRow] = {}
    for n, item in enumerate(dataset):
        row = _row(item, n)
        other = found.setdefault(row.key, row)
        if not np.array_equal(_weights(other), _weights(row)):
            what = f"Row {n} of the training set has the tokens and labels of an earlier one and other {COLUMN}."
            raise PlanError(what, "Leave one of the two out: a batch does not tell them apart.")
    if hasattr(dataset, "remove_columns"):  # of other collections the trainer leaves unknown columns out itself
        given["train_dataset"] = dataset.remove_columns(COLUMN)
    return {key: row for key, row in found.items() if WEIGHT in row.numbers}


def _columns(dataset: Any) -> set[str]:
    if hasattr(dataset, "column_names"):
        return set(dataset.column_names or ())
    first = dataset[0] if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) else {}
    return set(first) if isinstance(first, Mapping) else set()


def _row(item: Mapping[str, Any], n: int) -> TokenRow:
    ids, weights = as_array(item["input_ids"]), np.asarray(item[COLUMN], dtype=np.float64)
    labels = as_array(item["labels"]) if "labels" in item else ids
    if weights.shape != ids.shape or not (np.isfinite(weights) & (weights > 0))[labels != -100].all():
        what = f"Row {n} of the training set has {COLUMN} that are not one number above 0 for each target."
        raise DataError(what, f"Mend the column {COLUMN!r}; labels of -100 leave a token out.")
    return weighed(row_of(ids, labels, {}), weights)


def refuse_lost(weighed: Weighed, prepared: Any, name: str) -> None:
    """Raise PlanError where the trainer, called `name`, cut or labelled a row anew: it would lose its weights."""
    there = {row.key for row in dataset_rows(prepared)} if weighed else set()
    lost = next((row for key, row in weighed.items() if key not in there), None)
    if lost is not None:
        what = f"{name} cuts or labels a row of {len(lost.ids)} tokens anew, and the row has {COLUMN}."
        raise PlanError(what, "Raise max_length, set packing=False, and give labels instead of masks.")


def refuse_relabelled(weighed: Weighed, prepared: Any, collator: Any) -> None:
    """Raise PlanError where the collator labels a row anew, as one does that takes padding for what it looks like."""
    for n in range(0, len(prepared), max(1, len(prepared) // LOOKED)) if weighed else ():
        item = {k: v for k, v in prepared[n].items() if k in TENSORS}
        lost = {r.key for r in dataset_rows([item])} & weighed.keys() - {r.key for r in rows_of(collator([item]))}
        if lost:
            what = f"{type(collator).__name__} labels row {n} anew, and the row has {COLUMN}, which it would lose."
            raise PlanError(what, "Use a collator that keeps labels, such as DataCollatorForSeq2Seq(tokenizer).")


def _weights(row: TokenRow) -> np.ndarray:
    return row.numbers.get(WEIGHT, np.ones(len(row.ids), dtype=np.float32))
