"""The plan's mix as a dataset of the trainer, in the order the mix draws, and the sampler that keeps that order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import HoldfastError, PlanError, pip_install
from holdfast.hosts.hf_batches import dataset_rows, rows_of
from holdfast.hosts.hf_setup import mixes, steps_of
from holdfast.session import Session


@dataclass(frozen=True)
class Mixed:
    """The rows of a run in drawn order, those that hold more than a dataset can by key, and how many make an epoch."""

    dataset: Any
    known: dict[bytes, TokenRow]
    rows_an_epoch: int


Chosen = tuple[tuple[str, ...] | None, tuple[str, ...]]  # the sources that a stage draws from, and those it leaves out


def mixed(
    session: Session, dataset: Any, options: Any, collator: Any, name: str, weighed: Mapping[bytes, TokenRow]
) -> dict[Chosen, Mixed]:
    """The plan's mix in place of the prepared dataset, for each choice of sources that a stage makes.

    Empty when no method adds, changes, leaves out or orders rows. `weighed`: rows with weights, by key.

    Raises:
        PlanError: the trainer, called `name`, was given a stream, its collator makes other labels, it cannot carry
            what a method writes into rows, or a stage draws from a source that nobody brings.
    """
    if not any(mixes(m) for m in session.methods):
        for stage in session.stages:
            Mix(()).only(*stage.draws)
        for m in session.methods:  # all rows of a trainer's own data are called "task"
            m.check_mix(Mix([token_row((0, 0), 1)]), session.ctx)
        if session.held_out.methods:
            session.held_out.cut(Mix(dataset_rows(dataset, weighed)), session.ctx)
        return {}
    if not hasattr(dataset, "__len__"):
        raise PlanError(
            f"A method of the plan mixes rows into the data, but {name} was given a stream.",
            "Give a dataset with a length.",
        )
    whole = session.mix(dataset_rows(dataset, weighed))
    chosen = dict.fromkeys(s.draws for s in session.stages)
    return {c: _mixed(whole.only(*c), dataset, options, collator, name) for c in chosen}


def _mixed(mix: Mix, dataset: Any, options: Any, collator: Any, name: str) -> Mixed:
    seed = options.seed if options.data_seed is None else options.data_seed
    rows = mix.num_rows(1)
    first = _as_dataset(list(islice(mix.draw(seed), rows)), dataset, options, collator)
    epochs = _epochs(options, len(first))
    drawn = list(islice(mix.draw(seed), rows * epochs))
    made = _as_dataset(drawn, dataset, options, collator)
    known = _more_than_tokens(drawn, name)
    if getattr(options, "packing", False) and any(_holds_arrays(r) for r in known.values()):
        _refuse_cuts(known, made, name)
    return Mixed(made, known, len(made) // epochs)


def _more_than_tokens(rows: Sequence[TokenRow], name: str) -> dict[bytes, TokenRow]:
    """The rows that hold more than ids and targets, by key: by it they are found again in a batch."""
    known: dict[bytes, TokenRow] = {}
    for row in rows:
        if row.group is not None:
            raise PlanError(
                f"Rows of the group {row.group!r} must stand in one micro-batch, but {name} deals the training rows.",
                "Bring them as rows beside the task (asides), or use holdfast tune.",
            )
        if row.source == "task" and not _holds_arrays(row):
            continue
        if not _equal(known.setdefault(row.key, row), row):
            raise PlanError(
                f"Two equal rows of {row.source} hold other targets or numbers, which {name} cannot tell apart.",
                "Leave one of them out of the data.",
            )
    return known


def _holds_arrays(row: TokenRow) -> bool:
    return row.targets is not None or bool(row.numbers)


def _equal(a: TokenRow, b: TokenRow) -> bool:
    """Whether two rows of the same key hold the same arrays."""
    return (
        a.numbers.keys() == b.numbers.keys()
        and np.array_equal(a.predicted, b.predicted)
        and all(np.array_equal(v, b.numbers[n]) for n, v in a.numbers.items())
    )


def _refuse_cuts(known: dict[bytes, TokenRow], packed: Any, name: str) -> None:
    """Raise PlanError where packing cut a row: its pieces would be trained on without what the row holds."""
    there = {r.key for r in dataset_rows(packed)}
    cut = next((r for key, r in known.items() if _holds_arrays(r) and key not in there), None)
    if cut is not None:
        raise PlanError(
            f"{name} cuts a row of {len(cut.ids)} tokens to pack it, and with it what a method wrote into the row.",
            "Raise max_length, or set packing=False.",
        )


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
