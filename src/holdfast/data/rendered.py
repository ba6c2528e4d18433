"""Text that a chat template wrote."""

from __future__ import annotations


class Rendered(str):
    """Text that holds its own special tokens. Joining it with other text loses the mark."""

    __slots__ = ()
