"""Text that a chat template wrote, and which of it is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple


class Rendered(str):
    """Text that holds its own special tokens. Joining it with other text loses the mark."""

    __slots__ = ()


def is_chat(rows: Iterable[Any]) -> bool:
    """Whether the first of these rows (`rows.Row`) was written by a chat template; no row is not."""
    return any(isinstance(row.prompt, Rendered) for row in islice(rows, 1))


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
