"""What tests of trainers share, without TRL: its import takes longer than most tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset

from holdfast.data.mix import Mix, Source
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Past, Steer


def more(mix: Mix) -> Source:
    """Some of the task's rows without their first token: told apart by content, as the trainer has no labels."""
    return Source("more", [TokenRow(r.ids[1:], r.scored[1:], source="more") for r in mix.task[:7]], 0.25)


@dataclass(frozen=True, kw_only=True)
class Watcher(Method):
    """A steer site that uses all it is shown and all it may ask for, but for an end."""

    needs: ClassVar = frozenset({"gradients", "base_weights", "dense"})

    def data(self, mix: Mix, ctx: Any) -> Mix:
        return mix.add(more(mix)).hold_out(0.25)

    def held_out(self, mix: Mix, ctx: Any) -> Any:
        return mix.held_out()

    def looks(self, step: int) -> bool:
        return step % 2 == 0

    def steer(self, past: Past, state: Any) -> Steer:
        size = sum(float(g.norm()) for g in past.grads.values())
        far = sum(float((p - past.base[n]).norm()) for n, p in past.params.items())
        facts = [size, far, past.loss["task"], past.loss.get("task/more", 0.0), *past.held_out.values()]
        still = (rf"layers\.{past.step % 2}\.",) if past.step else ()
        return Steer(
            lr_factor=1 / (1 + 0.1 * size),
            source_weight={"more": 2.0 - past.step / 10},
            freeze_next=still,
            state={f"seen/{past.step}": torch.tensor(facts, dtype=torch.float64)},
        )


def dataset(rows: Sequence[TokenRow]) -> Dataset:
    labels = [np.where(r.scored, r.ids, -100).tolist() for r in rows]
    return Dataset.from_dict({"input_ids": [r.ids.tolist() for r in rows], "labels": labels})


def refused(build: Callable[[], Any], *words: str) -> None:
    with pytest.raises(PlanError) as caught:
        build()
    for word in words:
        assert word in str(caught.value)
