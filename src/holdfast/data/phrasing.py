"""The same prompt in other words: an instruction inside of it exchanged, or words put before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from holdfast.data.rendered import Rendered
from holdfast.data.rows import Row


def reworded(prompt: str, instruction: str, phrasing: str) -> str | None:
    """`prompt` with `phrasing` in the place of `instruction`, or on a line before it where `instruction` is "".

    None: the instruction does not stand in it; or words would stand before what a chat template wrote.
    """
    if instruction:
        return type(prompt)(prompt.replace(instruction, phrasing)) if instruction in prompt else None
    return None if isinstance(prompt, Rendered) else f"{phrasing}\n{prompt}"


def reworded_rows(rows: Sequence[Row], instruction: str, phrasing: str) -> list[Row]:
    """Those rows that can be said so, with their answers as they are."""
    said = ((r, reworded(r.prompt, instruction, phrasing)) for r in rows)
    return [replace(r, prompt=prompt) for r, prompt in said if prompt is not None]
