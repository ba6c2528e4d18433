"""Held-out losses: rows for choosing, scored by the model so far before the methods that asked for them steer.

A method that steers may name rows that never train (`Method.held_out`) and the steps at which it wants their losses
(`Method.looks`). Rows that several methods name are scored once; several processes share them, and all get the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow
from holdfast.engine.processes import gather, shares, world
from holdfast.method import Method
from holdfast.services import AT_ONCE, Context

Pool = Mapping[str, Sequence[TokenRow]]
Score = Callable[[Sequence[TokenRow]], Sequence[torch.Tensor]]  # rows -> for each (n,) log-probabilities


class HeldOut:
    """The held-out rows of the methods of one run."""

    def __init__(self, methods: Sequence[Method]):
        self.methods = [m for m in methods if m.holds_out]
        self.pools: dict[str, Pool] = {}
        self.parts: dict[str, float] = {}  # of the mix, by source, for methods that weigh these

    def cut(self, mix: Mix, ctx: Context) -> None:
        """Ask every method for its rows, once, when the mix has all its sources."""
        self.pools = {m.name: m.held_out(mix, ctx) for m in self.methods}
        self.parts = mix.parts() if self.methods else {}

    def losses(self, step: int, model: Any, score: Score) -> dict[str, dict[str, float]]:
        """Method -> label -> mean loss per token, for the methods that look at step `step`."""
        looking = {m.name: self.pools[m.name] for m in self.methods if m.looks(step)}
        rows = {r.key: r for pool in looking.values() for rows in pool.values() for r in rows}
        sums = _sums(list(rows.values()), model, score)
        return {name: {label: _mean(rows, sums) for label, rows in pool.items()} for name, pool in looking.items()}


def _mean(rows: Sequence[TokenRow], sums: Mapping[bytes, float]) -> float:
    return sum(sums[r.key] for r in rows) / max(1, sum(r.num_scored for r in rows))


def _sums(rows: Sequence[TokenRow], model: Any, score: Score) -> dict[bytes, float]:
    """The loss of every row, summed over its tokens in fp64; every process scores a share of them."""
    rank, num = world(model)
    dealt = shares(range(len(rows)), [len(r.ids) for r in rows], num)
    mine, found = dealt[rank], []
    for n in range(0, len(mine), AT_ONCE):
        found += [-float(p.double().sum()) for p in score([rows[i] for i in mine[n : n + AT_ONCE]])]
    said = [found] if num == 1 else gather(found)
    return {
        rows[i].key: loss for part, sums in zip(dealt, said, strict=True) for i, loss in zip(part, sums, strict=True)
    }
