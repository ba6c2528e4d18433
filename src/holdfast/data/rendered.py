"""Text that a chat template wrote, and which of it is trained on."""

from __future__ import annotations

from typing import NamedTuple


class Rendered(str):
    """Text that holds its own special tokens. Joining it with other text loses the mark."""

    __slots__ = ()


class Turn(NamedTuple):
    """Characters [start, end) of prompt + completion that are trained on; weight: of the losses of their tokens."""

    start: int
    end: int
    weight: float = 1.0


class Pair(NamedTuple):
    """What a record becomes. turns: what is trained on; () is the completion."""

    prompt: str
    completion: str
    turns: tuple[Turn, ...] = ()
