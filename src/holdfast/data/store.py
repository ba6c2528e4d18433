"""Rows on disk: text and tokens in flat files that are mapped into memory and read where they are asked for.

A folder holds, beside `texts` and `tokens`, where each row ends in them, and the turns and weights of the rows that
have some. It is written once and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np

from holdfast.data.rendered import Rendered, Turn
from holdfast.data.rows import Row
from holdfast.engine.pack import WEIGHT, TokenRow

KINDS = {"ends": np.int64, "rendered": np.bool_, "sets": np.int16, "token_ends": np.int64, "of": np.int64}
KINDS |= {"turns": np.float64, "turn_ends": np.int64}  # (start, end, weight) of each turn; how many up to each row
KINDS |= {"weight_ends": np.int64}  # as token_ends, in the weights
TEXTS = ("ends", "rendered", "sets", "turns", "turn_ends")  # what a text needs of them
NAMES = "names.json"  # of the sets that `sets` numbers
BLOCK = 1000  # rows that are looked up together
FLAT = {"texts": np.uint8, "tokens": np.int32, "scored": np.bool_, "weights": np.float32}


class Writer:
    """Fills a folder row by row, until its `with` ends. Only the numbers of where rows end are kept in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb", buffering=1 << 20) for name in FLAT}
        self._lists: dict[str, list[float]] = {name: [] for name in KINDS}
        self._names: dict[str, int] = {}
        self._at = self._tokens_at = self._weights_at = 0

    def add(self, row: Row) -> int:
        """Add the text of a row; returns its number."""
        for text in (row.prompt, row.completion, row.where):
            raw = text.encode()
            self._files["texts"].write(raw)
            self._at += len(raw)
            self._lists["ends"].append(self._at)
        self._lists["rendered"].append(isinstance(row.prompt, Rendered))
        self._lists["sets"].append(self._names.setdefault(row.source, len(self._names)))
        self._lists["turns"] += chain.from_iterable(row.turns)
        self._lists["turn_ends"].append(len(self._lists["turns"]) // 3)
        return len(self._lists["rendered"]) - 1

    def add_tokens(self, number: int, made: Iterable[TokenRow]) -> None:
        """Add the token rows of the row with that number."""
        for one in made:
            self._files["tokens"].write(one.ids.astype(np.int32).tobytes())
            self._files["scored"].write(one.scored.tobytes())
            self._tokens_at += len(one.ids)
            self._lists["token_ends"].append(self._tokens_at)
            weights = one.numbers.get(WEIGHT, np.zeros(0))
            self._files["weights"].write(weights.astype(np.float32).tobytes())
            self._weights_at += len(weights)
            self._lists["weight_ends"].append(self._weights_at)
            self._lists["of"].append(number)

    def texts(self) -> Texts:
        """The texts so far."""
        self._files["texts"].flush()
        of = {name: np.asarray(self._lists[name], dtype=KINDS[name]) for name in TEXTS}
        return Texts(_mapped(self.folder / "texts.bin", np.uint8), of, tuple(self._names))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            self._write_ends()

    def _write_ends(self) -> None:
        for name, kind in KINDS.items():
            np.save(self.folder / f"{name}.npy", np.asarray(self._lists[name], dtype=kind))
        (self.folder / NAMES).write_text(json.dumps(list(self._names)), encoding="utf-8")


class Texts(Sequence[Row]):
    """The rows of a folder, or those of them that `chosen` numbers, as `Row`s made when asked for.

    Args:
        raw: the bytes of all texts, end to end.
        of: the arrays of `TEXTS`.
        names: of the sets.
    """

    def __init__(
        self, raw: np.ndarray, of: Mapping[str, np.ndarray], names: tuple[str, ...], chosen: np.ndarray | None = None
    ):
        self._raw, self._of, self._names = raw, of, names
        self._ends, self._sets = of["ends"].reshape(-1, 3), of["sets"]
        self._turns = of["turns"].reshape(-1, 3)
        self.chosen = np.arange(len(self._sets)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Texts: ...
    def __getitem__(self, at: int | slice) -> Row | Texts:
        if isinstance(at, slice):
            return self.only(self.chosen[at])
        return next(self._rows(self.chosen[[at]]))

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self._rows(self.chosen[n : n + BLOCK]) for n in range(0, len(self), BLOCK))

    def _rows(self, chosen: np.ndarray) -> Iterator[Row]:
        """Some rows; what numpy holds is taken out of it for all of them at once."""
        begins = np.where(chosen > 0, self._ends[chosen - 1, 2], 0).tolist()
        kinds = zip(self._of["rendered"][chosen].tolist(), self._sets[chosen].tolist(), chosen.tolist(), strict=True)
        for begin, (a, b, c), (rendered, n, number) in zip(begins, self._ends[chosen].tolist(), kinds, strict=True):
            raw = self._raw[begin:c].tobytes()
            prompt, completion, where = raw[: a - begin], raw[a - begin : b - begin], raw[b - begin :]
            text, turns = prompt.decode(), self._turns_of(number) if len(self._turns) else ()
            name = self._names[n]
            yield Row(Rendered(text) if rendered else text, completion.decode(), name, where.decode(), turns)

    def _turns_of(self, number: int) -> tuple[Turn, ...]:
        found = self._turns[_part(self._of["turn_ends"], number)].tolist()
        return tuple(Turn(int(start), int(end), weight) for start, end, weight in found)

    @property
    def sources(self) -> list[str]:
        """The set of each row (`Row.source`)."""
        return [self._names[n] for n in self._sets[self.chosen]]

    def only(self, chosen: Sequence[int] | np.ndarray) -> Texts:
        """The rows with these numbers, in this order."""
        return Texts(self._raw, self._of, self._names, np.asarray(chosen, dtype=np.int64))


class Tokens(Sequence[TokenRow]):
    """The token rows of a folder, or those that `chosen` numbers; each is made when asked for."""

    def __init__(self, folder: Path, chosen: np.ndarray | None = None):
        self._folder, self._names = folder, _names(folder)
        flat = (_mapped(folder / f"{name}.bin", FLAT[name]) for name in ("tokens", "scored", "weights"))
        self._ids, self._scored, self._weights = flat
        self._ends = np.load(folder / "token_ends.npy", mmap_mode="r")
        self._weight_ends = np.load(folder / "weight_ends.npy", mmap_mode="r")
        self.of = np.load(folder / "of.npy", mmap_mode="r")
        self._sets = np.load(folder / "sets.npy", mmap_mode="r")
        self.chosen = np.arange(len(self._ends)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> TokenRow: ...
    @overload
    def __getitem__(self, at: slice) -> Tokens: ...
    def __getitem__(self, at: int | slice) -> TokenRow | Tokens:
        if isinstance(at, slice):
            return Tokens(self._folder, self.chosen[at])
        n = int(self.chosen[at])
        part, weights = _part(self._ends, n), self._weights[_part(self._weight_ends, n)]
        source = self._names[self._sets[self.of[n]]]
        numbers = {WEIGHT: weights.copy()} if len(weights) else {}
        return TokenRow(self._ids[part].astype(np.int64), self._scored[part].copy(), "task", source, numbers=numbers)

    @property
    def sources(self) -> list[str]:
        """The set of each row (`TokenRow.source`)."""
        return [self._names[n] for n in self._sets[self.of[self.chosen]]]

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[n] for n in range(len(self)))

    def find(self, row: TokenRow) -> int | None:
        """The number of the text that a token row comes from; None for one that is not of these."""
        lengths = np.diff(self._ends, prepend=0)[self.chosen]
        for at in np.flatnonzero(lengths == len(row.ids)):
            if self[int(at)].key == row.key:
                return int(self.of[self.chosen[at]])
        return None


def _part(ends: np.ndarray, n: int) -> slice:
    """Where the n-th row stands in what lies end to end."""
    return slice(int(ends[n - 1]) if n else 0, int(ends[n]))


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(json.loads((folder / NAMES).read_text(encoding="utf-8")))


def open_texts(folder: Path) -> Texts:
    """The texts of a written folder."""
    of = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in TEXTS}
    return Texts(_mapped(folder / "texts.bin", np.uint8), of, _names(folder))


def _mapped(path: Path, kind: type) -> np.ndarray:
    """The file as a plain array, of which slices are cheap; an empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype=kind, mode="r")) if path.stat().st_size else np.zeros(0, dtype=kind)
