"""The plan's mix as a dataset of the trainer, in the order the mix draws, and the sampler that keeps that order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from holdfast.engine.pack import TokenRow
from holdfast.errors import HoldfastError, PlanError, pip_install
from holdfast.hosts.hf_batches import dataset_rows, rows_of
from holdfast.hosts.hf_setup import mixes, steps_of
from holdfast.session import Session


@dataclass(frozen=True)
class Mixed:
    """The rows of a run in drawn order, the source of those that are not of the task, and how many make an epoch."""

    dataset: Any
    sources: dict[bytes, str]
    rows_an_epoch: int


def mixed(session: Session, dataset: Any, options: Any, collator: Any, name: str) -> Mixed | None:
    """The plan's mix in place of the prepared dataset; None when no method adds or changes rows.

    Raises:
        PlanError: the trainer, called `name`, was given a stream, or its collator makes other labels.
    """
    if not any(mixes(m) for m in session.methods):
        return None
    if not hasattr(dataset, "__len__"):
        raise PlanError(
            f"A method of the plan mixes rows into the data, but {name} was given a stream.",
            "Give a dataset with a length.",
        )
    mix = session.mix(dataset_rows(dataset))
    seed = options.seed if options.data_seed is None else options.data_seed
    rows = mix.num_rows(1)
    first = _as_dataset(list(islice(mix.draw(seed), rows)), dataset, options, collator)
    epochs = _epochs(options, len(first))
    drawn = list(islice(mix.draw(seed), rows * epochs))
    made = _as_dataset(drawn, dataset, options, collator)
    return Mixed(made, {r.key: r.source for r in drawn if r.source != "task"}, len(made) // epochs)


def _epochs(options: Any, rows: int) -> int:
    if options.max_steps <= 0:
        return math.ceil(options.num_train_epochs)
    return math.ceil(options.max_steps / steps_of(options, rows))


def _as_dataset(rows: Sequence[TokenRow], like: Any, options: Any, collator: Any) -> Any:
    """Rows in the columns of the dataset `like`, packed again when they were."""
    try:
        from datasets import Dataset
    except ImportError as error:
        what = f"with_plan hands rows to the trainer by the package datasets, which cannot be imported ({error})."
        raise HoldfastError(what, f"Run: {pip_install('datasets')}.") from error

    columns = {
        "input_ids": [r.ids.tolist() for r in rows],
        "labels": [np.where(r.scored, r.ids, -100).tolist() for r in rows],
    }
    if "attention_mask" in like[0]:
        columns["attention_mask"] = [[1] * len(r.ids) for r in rows]
    made = Dataset.from_dict(columns)
    _check_collator(collator, rows, made)
    if getattr(options, "packing", False):  # an SFTConfig
        from trl import pack_dataset

        packed = made.select_columns(["input_ids", "labels"])
        return pack_dataset(packed, options.max_length, options.packing_strategy)
    return made


def _check_collator(collator: Any, rows: Sequence[TokenRow], made: Any) -> None:
    """A collator that makes labels itself would score what a method left out."""
    for source, n in {r.source: n for n, r in enumerate(rows) if r.source != "task"}.items():
        got = rows_of(collator([made[n]]))
        if [r.key for r in got] != [rows[n].key]:
            raise PlanError(
                f"{type(collator).__name__} changes the labels of the rows that {source} adds.",
                "Use a collator that keeps the labels column, such as DataCollatorForSeq2Seq(tokenizer).",
            )


class InOrder(torch.utils.data.Sampler):
    """The rows of one epoch in their own order, from wherever the epoch starts."""

    def __init__(self, size: int, first: Callable[[], int], whole: int):
        self.size, self.first, self.whole = size, first, whole

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        first = self.first()
        return iter([(first + n) % self.whole for n in range(self.size)])
