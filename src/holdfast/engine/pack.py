"""Rows of tokens, packed into one forward without padding and without attention across rows.

Legend: B rows, T tokens of the packed row, N scored positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from holdfast.engine.layout import Layout, upload

WEIGHT = "task/weight"  # in TokenRow.numbers: what each target's loss is multiplied by; rows without it have 1


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One tokenised example.

    Attributes:
        ids: (T,) token ids.
        scored: (T,) bool, True where the token is a target; the first is never one.
        owner: "task" if its targets carry the task's cross-entropy, else the method that asked for the row.
        source: where it came from, for the realised mix: "task", or "task:" and the name of one of the task's sets.
        gold: (T,) bool, True where the target is part of a right answer; for methods that tell these apart.
        targets: (T,) ids to be predicted where `scored`; None: `ids`, what is read is what is predicted.
        numbers: named (T,) float arrays along its tokens; `View.number` gives them at the scored positions.
        whole: the row that this is a part of: the same tokens, fewer of them scored.
        blend: (T,) ids that are read beside `ids`: a token is embedded as (1 - share) E(ids) + share E(blend), with
            `blend_share`; None: as `ids` alone. The key does not know of it: the base reads `ids`.
        group: rows of one owner and group (a pair) stand in one micro-batch when they are of one step.
        key: identity of what is read and where it is scored; a stored teacher finds its answers by it.
    """

    ids: np.ndarray
    scored: np.ndarray
    owner: str = "task"
    source: str = "task"
    gold: np.ndarray | None = None
    targets: np.ndarray | None = None
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    group: str | None = None
    whole: TokenRow | None = None
    blend: np.ndarray | None = None
    blend_share: float = 0.0

    @property
    def key(self) -> bytes:
        return self.ids.tobytes() + self.scored.tobytes()

    @property
    def of_task(self) -> bool:
        """Whether it is a row of the task's own sets: no method brought it."""
        return self.owner == "task" and (self.source == "task" or self.source.startswith("task:"))

    @property
    def num_scored(self) -> int:
        return int(self.scored.sum())

    @property
    def predicted(self) -> np.ndarray:
        """(T,) ids to be predicted where `scored`."""
        return self.ids if self.targets is None else self.targets

    def cut(self, most: int) -> TokenRow:
        """The first `most` tokens, with all that belongs to them."""
        if len(self.ids) <= most:
            return self
        gold, targets, blend = (None if a is None else a[:most] for a in (self.gold, self.targets, self.blend))
        numbers = {name: a[:most] for name, a in self.numbers.items()}
        return replace(
            self, ids=self.ids[:most], scored=self.scored[:most], gold=gold, targets=targets, numbers=numbers,
            blend=blend,
        )  # fmt: skip


def token_row(ids: Sequence[int] | np.ndarray, start: int, owner: str = "task", source: str = "task") -> TokenRow:
    """A row whose targets are `ids[start:]`; start >= 1."""
    array = np.asarray(ids, dtype=np.int64)
    scored = np.zeros(len(array), dtype=bool)
    scored[max(1, start) :] = True
    return TokenRow(array, scored, owner, source)


@dataclass
class Packed:
    """One packed forward: ids, positions (1, T); where (N,) scored positions; target (N,); row (N,) of its row."""

    ids: torch.Tensor
    positions: torch.Tensor
    where: torch.Tensor
    target: torch.Tensor
    row: np.ndarray
    layout: Layout
    rows: Sequence[TokenRow]

    def by_row(self, values: torch.Tensor) -> list[torch.Tensor]:
        """(N, ...) values at the scored positions, in a part for each row."""
        return list(values.split(np.bincount(self.row, minlength=len(self.rows)).tolist()))


def pack(rows: Sequence[TokenRow], device: Any = "cpu", prompts: Sequence[int] | None = None) -> Packed:
    """Lay `rows` end to end. `prompts[i]` soft-prompt tokens are put before row i (their ids are 0, never scored)."""
    prompts = prompts or [0] * len(rows)
    lengths = [len(r.ids) + p for r, p in zip(rows, prompts, strict=True)]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    flat = np.zeros(sum(lengths), dtype=np.int64)
    wheres, targets, row = [], [], []
    for n, (r, p, s) in enumerate(zip(rows, prompts, starts, strict=True)):
        flat[s + p : s + p + len(r.ids)] = r.ids
        at = np.flatnonzero(r.scored)
        wheres.append(s + p + at - 1)
        targets.append(r.predicted[at])
        row.append(np.full(len(at), n))
    places = np.concatenate([np.arange(n) for n in lengths])
    arrays = [flat, places, np.concatenate(wheres), np.concatenate(targets)]
    ids, positions, where, target = upload(np.concatenate(arrays), device).split([len(a) for a in arrays])  # one copy
    return Packed(ids[None], positions[None], where, target, np.concatenate(row), Layout(lengths, device), rows)
