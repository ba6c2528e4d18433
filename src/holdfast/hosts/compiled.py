"""The blocks of a model compiled by torch for the steps of training, and for nothing else.

Each block is compiled by itself, for rows of any length: some graphs at the first step, whatever the number of blocks,
and none later. The attention of packed rows stays outside, as its shapes are laid out in Python. Looks, scores and
answers run as ever: with a cache of keys, or without gradients, they would be compiled once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.engine.attention import ATTENTION, packed_attention, register
from holdfast.engine.ways import LAST, blocks
from holdfast.errors import PlanError
from holdfast.plan import Plan

BACKEND = "inductor"


def check_compiled(asked: bool, plan: Plan) -> None:
    """Raise PlanError for a method that looks into blocks that are `asked` to be compiled."""
    for m in plan.active if asked else ():
        looks = "replaces modules" if "replace" in m.sites() else "reads states between blocks"
        if "replace" in m.sites() or set(m.hidden_layers()) - {LAST}:
            raise PlanError(
                f"training.torch_compile is true, but {m.name} {looks}, which compiled blocks do not show.",
                f"Remove training.torch_compile, or {m.name}.",
            )


class Compiled:
    """The blocks of `model`, to be switched on around a step's forward and backward."""

    def __init__(self, model: Any):
        register(ATTENTION, torch.compiler.disable(packed_attention))
        own: list[Any] = list(blocks(model))
        self._calls = [(b, torch.compile(b._call_impl, dynamic=True, backend=BACKEND)) for b in own]

    @contextmanager
    def on(self) -> Iterator[None]:
        """What `Module.compile` sets, for the duration."""
        for block, call in self._calls:
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block, _ in self._calls:
                block._compiled_call_impl = None
