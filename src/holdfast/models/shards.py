"""Writing a copy of a safetensors file whose tensors are made anew, one at a time.

The package safetensors writes what is in memory as a whole. Here the header of an existing file is taken over to the
byte: same names, shapes, dtypes and order. Only the numbers behind it are new, each tensor where the old one lay.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError

if TYPE_CHECKING:
    import torch


def rewrite(source: Path, target: Path, make: Callable[[str, str], torch.Tensor]) -> None:
    """Write `target` with the header of `source`.

    make: (name, dtype as safetensors spells it, like "BF16") -> the tensor, of the shape and dtype of the header.

    Raises:
        ModelError: `source` is no safetensors file.
    """
    head, entries = header(source)
    with target.open("wb") as out:
        out.write(head)
        for name in sorted(entries, key=lambda n: entries[n]["data_offsets"]):
            data = _bytes(make(name, entries[name]["dtype"]))
            start, end = entries[name]["data_offsets"]
            assert len(data) == end - start, f"{name} is of another size than in {source}"
            out.write(data)


def header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """The first bytes of a file up to its numbers, and what they say of each tensor: dtype, shape, data_offsets."""
    try:
        with file.open("rb") as opened:
            size = opened.read(8)
            text = opened.read(int.from_bytes(size, "little"))
        entries = json.loads(text)
    except (ValueError, OverflowError, MemoryError) as error:
        raise ModelError(f"{file} is not a safetensors file.", "Copy or download the model again.") from error
    entries.pop("__metadata__", None)
    return size + text, entries


def _bytes(t: torch.Tensor) -> memoryview:
    import torch

    return memoryview(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
