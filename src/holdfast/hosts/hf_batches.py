"""From a trainer's batches and datasets to token rows, one per document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from holdfast.data.rows import Row
from holdfast.engine.pack import TokenRow
from holdfast.errors import DataError, PlanError

TENSORS = frozenset(
    "input_ids labels shift_labels attention_mask position_ids cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k "
    "seq_idx token_type_ids".split()
)


def rows_of(batch: Mapping[str, Any], known: Mapping[bytes, TokenRow] | None = None) -> list[TokenRow]:
    """One row per document of a collated batch: (B, T) input_ids and unshifted labels, -100 where nothing is scored.

    Documents end with the attention mask, and where position_ids start again or cu_seq_lens_q says so. Rows without a
    target are left out (one is kept when none has any). `known`: rows that hold more than a batch can, by their key.

    Raises:
        DataError: the batch has no token ids, or says something of its tokens that a row of tokens cannot hold.
    """
    return [row for row, _ in placed_rows(batch, known)]


def placed_rows(
    batch: Mapping[str, Any], known: Mapping[bytes, TokenRow] | None = None
) -> list[tuple[TokenRow, np.ndarray]]:
    """`rows_of`, each row with where its tokens stand in the flattened (B * T,) batch."""
    if "input_ids" not in batch or set(batch) - TENSORS:
        strange = sorted(set(batch) - TENSORS) or ["no input_ids"]
        raise DataError(
            f"The collator gives a batch with {', '.join(strange)}, but a plan trains on token ids alone.",
            "Use a text-only dataset with input_ids and labels and without other columns, or remove_unused_columns.",
        )
    ids = as_array(batch["input_ids"])  # (B, T)
    labels, positions, starts = _labels(batch, ids), _positions(batch, ids), _starts(batch, ids)
    real = _like(batch, "attention_mask", ids).astype(bool) if "attention_mask" in batch else ids >= 0
    _refuse_marks(batch, ids, labels, real)
    out = []
    for n, columns in enumerate(np.flatnonzero(r) for r in real):
        parts = np.split(columns, np.flatnonzero(starts[n, columns[1:]]) + 1) if len(columns) else []
        _refuse_documents(parts, labels[n], None if positions is None else positions[n], "attention_mask" in batch)
        out += [(row_of(ids[n, at], labels[n, at], known or {}), n * ids.shape[1] + at) for at in parts]
    return [r for r in out if r[0].num_scored] or out[:1]


def _refuse_marks(batch: Mapping[str, Any], ids: np.ndarray, labels: np.ndarray, real: np.ndarray) -> None:
    """Raise DataError where the trainer's own forward would read something that a row leaves out."""
    last = real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)
    holes = real.any(axis=1) & (last - real.argmax(axis=1) + 1 != real.sum(axis=1))
    types = _like(batch, "token_type_ids", ids) if "token_type_ids" in batch else np.zeros(1)
    for wrong, what, cure in (
        (
            (labels[:, 1:] != -100) & ~real[:, 1:],
            "labels where attention_mask is 0, so that padding would be learnt",
            "Set these labels to -100, as DataCollatorForSeq2Seq(tokenizer) does.",
        ),
        (
            holes,
            "an attention_mask with zeros between ones, but a plan reads every row from end to end",
            "Leave these tokens out of input_ids; labels of -100 keep tokens from being learnt.",
        ),
        (types, "token_type_ids other than 0, which a plan does not read", "Leave the column out."),
    ):
        if wrong.any():
            raise DataError(f"The collator gives {what}.", cure)


def _refuse_documents(parts: list[np.ndarray], labels: np.ndarray, positions: Any, masked: bool) -> None:
    """Raise DataError where documents of one row are not read as the trainer's own forward reads them."""
    if len(parts) > 1 and masked:
        raise DataError(
            "The collator gives position_ids that start again inside a row, and an attention_mask, with which "
            "transformers lets later documents see earlier ones.",
            "Leave attention_mask out of packed batches.",
        )
    for at in parts:
        if positions is not None and (positions[at] != np.arange(len(at))).any():
            raise DataError(
                f"The collator gives position_ids {positions[at][:4].tolist()}..., but a plan counts every document "
                "from 0, one by one.",
                "Leave position_ids out, or count them so.",
            )
        if at[0] > 0 and labels[at[0]] != -100:
            raise DataError(
                "The collator gives a label to a first token that stands behind padding or another document, which "
                "nothing in its own row predicts.",
                "Pad on the right (tokenizer.padding_side), or set the labels of first tokens to -100.",
            )


def row_of(ids: np.ndarray, labels: np.ndarray, known: Mapping[bytes, TokenRow]) -> TokenRow:
    scored = labels != -100
    scored[0] = False  # nothing stands before the first token
    if (labels[scored] != ids[scored]).any():
        raise DataError(
            "The collator gives labels that are not the tokens themselves (already shifted, or replaced).",
            "Give labels at the places of their own tokens, -100 where there is no loss.",
        )
    row = TokenRow(ids.astype(np.int64), scored)
    return known.get(row.key, row)


def as_array(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _like(batch: Mapping[str, Any], name: str, ids: np.ndarray) -> np.ndarray:
    value = as_array(batch[name])
    if value.shape != ids.shape:
        raise DataError(
            f"{name} of a batch has shape {value.shape}, but input_ids has {ids.shape}.",
            "Use a collator that gives one number per token.",
        )
    return value


def _labels(batch: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    if "shift_labels" in batch:
        shifted = _like(batch, "shift_labels", ids)
        return np.concatenate([np.full_like(shifted[:, :1], -100), shifted[:, :-1]], axis=1)
    if "labels" not in batch:
        raise DataError(
            "The collator gives batches without labels, so nothing says what to learn.",
            "Use a collator with labels, such as DataCollatorForLanguageModeling(tokenizer, mlm=False).",
        )
    return _like(batch, "labels", ids)


def _positions(batch: Mapping[str, Any], ids: np.ndarray) -> np.ndarray | None:
    return _like(batch, "position_ids", ids) if "position_ids" in batch else None


def _starts(batch: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """(B, T) bool: where a document starts inside a row."""
    if "position_ids" in batch:
        return _like(batch, "position_ids", ids) == 0
    starts = np.zeros(ids.shape, dtype=bool)
    if "cu_seq_lens_q" in batch:  # one flat row; the last entry is its length
        starts[0, as_array(batch["cu_seq_lens_q"])[:-1]] = True
    return starts


def text_rows(dataset: Any) -> list[Row]:
    """prompt/completion text of the task, for methods that build prompts from it."""
    if not hasattr(dataset, "__len__") or not {"prompt", "completion"} <= set(
        getattr(dataset, "column_names", None) or ()
    ):
        return []
    pairs = zip(dataset["prompt"], dataset["completion"], strict=True)
    return [Row(p, c) for p, c in pairs if isinstance(p, str) and isinstance(c, str)]


def dataset_rows(dataset: Any, known: Mapping[bytes, TokenRow] | None = None) -> list[TokenRow]:
    """Rows of a tokenised dataset, packed ones taken apart. `known`: rows that hold more than that, by their key."""
    out = []
    for item in dataset:
        if "input_ids" not in item:
            raise PlanError(
                "A method of the plan mixes rows into the data, but the dataset has no input_ids.",
                "Tokenise it, or use SFTTrainer, which does.",
            )
        ids = as_array(item["input_ids"])
        labels = as_array(item["labels"]) if "labels" in item else ids
        cuts = np.cumsum(item.get("seq_lengths") or [len(ids)])[:-1]
        parts = zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
        out += [row_of(a, b, known or {}) for a, b in parts if len(a)]
    return out
