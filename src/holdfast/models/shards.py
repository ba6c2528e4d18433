"""Writing a copy of a safetensors file whose tensors are made anew, whole ones or pieces of them.

The package safetensors writes what is in memory as a whole. Here the header of an existing file is taken over to the
byte: same names, shapes, dtypes and order. Only the numbers behind it are new, each where the old one lay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Lock, local
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError

if TYPE_CHECKING:
    import torch

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as torch calls them
PIECE = 1 << 18  # entries: what is computed on so many stays in the cache of a core
Job = tuple[str, str, slice, int]  # tensor, dtype, its entries, the byte where they begin


def rewrite(
    source: Path, target: Path, make: Callable[[str, str, slice], torch.Tensor], piece: int | None, at_once: int
) -> Iterator[int]:
    """Write `target` with the header of `source`; yields the bytes that were added, piece by piece.

    Args:
        make: (name, dtype as safetensors spells it, like "BF16", entries) -> these entries of the flat tensor, in
            that dtype.
        piece: entries in one call of `make`; None: all of a tensor.
        at_once: calls at a time, each with its share of the threads.

    Raises:
        ModelError: `source` is no safetensors file.
    """
    from holdfast.engine.threads import side_by_side

    head, entries = header(source)
    lock = Lock()
    with target.open("wb") as out:
        out.write(head)

        def put(job: Job) -> int:
            name, dtype, part, at = job
            data = _bytes(make(name, dtype, part))
            with lock:
                out.seek(at)
                out.write(data)
            return len(data)

        yield from side_by_side(put, list(_jobs(entries, len(head), piece)), at_once)
    assert target.stat().st_size == source.stat().st_size, f"{target} is of another size than {source}"


def _jobs(entries: dict[str, Any], start: int, piece: int | None) -> Iterator[Job]:
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        size, (first, end) = math.prod(entry["shape"]), entry["data_offsets"]
        step = piece or max(1, size)
        for a in range(0, size, step):
            yield name, entry["dtype"], slice(a, min(a + step, size)), start + first + a * ((end - first) // size)


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


class Parts:
    """Pieces of the tensors of safetensors files, copied into one buffer for each thread.

    A buffer that is used again stays in the cache of its core, and the system need not give out clean memory for
    every piece.
    """

    def __init__(self, files: Iterable[Path]):
        self._headers = {file: header(file) for file in files}
        self._mine = local()

    def read(self, file: Path, name: str, part: slice) -> torch.Tensor | None:
        """Some entries of a flat tensor, good until this thread reads again; None for dtypes beyond DTYPES."""
        import torch

        head, entries = self._headers[file]
        if entries[name]["dtype"] not in DTYPES:
            return None
        dtype = dtype_of(entries[name]["dtype"])
        into = self._buffer((part.stop - part.start) * dtype.itemsize)
        with file.open("rb", buffering=0) as opened:
            opened.seek(len(head) + entries[name]["data_offsets"][0] + part.start * dtype.itemsize)
            got = opened.readinto(into)
        assert got == len(into), f"{file} is shorter than its header says"
        return torch.frombuffer(into, dtype=dtype)

    def _buffer(self, size: int) -> memoryview:
        if len(getattr(self._mine, "buffer", b"")) < size:
            self._mine.buffer = bytearray(size)
        return memoryview(self._mine.buffer)[:size]


def dtype_of(name: str) -> torch.dtype:
    """The dtype that safetensors calls like this, one of DTYPES."""
    import torch

    return getattr(torch, DTYPES[name])


def _bytes(t: torch.Tensor) -> memoryview:
    import torch

    return memoryview(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
