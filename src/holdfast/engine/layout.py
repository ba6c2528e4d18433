"""Where packed tokens stand for their attention: grids of lines with padding, or one line with the ends of its rows.

Legend: T tokens of the packed row, B lines of a grid, W their width, P cells of all grids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

BOUND: tuple[int, ...] = (256, 1024, 4096)  # widths of the lines of `fixed`; beyond, each is 4 times the one before
CELLS = 4096  # of one of its grids, at least
Line = list[int]  # the rows that stand in it, one behind the other


def upload(array: np.ndarray, device: Any) -> torch.Tensor:
    """An array on `device`; a GPU is not waited for."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass
class Grids:
    """Packed tokens in grids.

    sizes: (B, W) of each; index: (P,) token of each cell, any where it is padding; back: (T,) cell of each token;
    first: (P,) column where the row of a cell begins, None where every row has a line of its own.
    """

    sizes: list[tuple[int, int]]
    index: torch.Tensor
    back: torch.Tensor
    first: torch.Tensor | None = None
    _masks: dict[Any, list[torch.Tensor | None]] = field(default_factory=dict)

    def masks(self, window: int | None, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """For each grid what is added to its scores, (1 or B, 1, W, W); None where plain causality is enough."""
        key = window, dtype
        if key not in self._masks:
            firsts = self._firsts()
            self._masks[key] = [self._mask(w, f, window, dtype) for (_, w), f in zip(self.sizes, firsts, strict=True)]
        return self._masks[key]

    def _firsts(self) -> Sequence[torch.Tensor | None]:
        if self.first is None:
            return [None] * len(self.sizes)
        each = self.first.split([b * w for b, w in self.sizes])
        return [f.view(size) for f, size in zip(each, self.sizes, strict=True)]

    def _mask(self, width: int, first: Any, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        if first is None and (window is None or window >= width):
            return None
        at = torch.arange(width, device=self.index.device)
        sees = at[None, None, :] <= at[None, :, None]
        if window is not None and window < width:
            sees = sees & (at[None, :, None] - at[None, None, :] < window)
        if first is not None:
            sees = sees & (at[None, None, :] >= first[:, :, None])
        return torch.zeros(sees.shape, dtype=dtype, device=at.device).masked_fill_(~sees, float("-inf"))[:, None]


@dataclass
class Layout:
    """The rows of one packed forward, laid out for whichever attention asks; each is computed once a forward.

    asked: the attention that a user named, if any; said: what each layer asked of its own: (window, soft cap, whether
    it has sinks).
    """

    lengths: Sequence[int]
    device: Any = "cpu"
    asked: str | None = None
    said: list[tuple[int | None, float | None, bool]] = field(default_factory=list)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def ends(self) -> torch.Tensor:
        """(B + 1,) int32: 0 and where each row ends, as kernels of variable length read it."""
        return upload(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32), self.device)

    @cached_property
    def blocks(self) -> Grids:
        """Rows of similar length side by side, one a line: little padding, and another shape at every step."""
        order = sorted(range(len(self.lengths)), key=lambda n: -self.lengths[n])
        groups: list[list[Line]] = []
        for n in order:
            if groups and self.lengths[n] * 1.5 >= self.lengths[groups[-1][0][0]]:
                groups[-1].append([n])
            else:
                groups.append([[n]])
        return self._grids(((g, self.lengths[g[0][0]]) for g in groups), alone=True)

    @cached_property
    def fixed(self) -> Grids:
        """Few shapes, whatever the rows: lines of `BOUND` widths, `CELLS` a grid, with several rows in a line."""
        widths, made, below = [*BOUND], list[tuple[list[Line], int]](), 0
        while widths[-1] < self.longest:
            widths.append(4 * widths[-1])
        for width in widths:
            lines = self._fill((n for n, length in enumerate(self.lengths) if below < length <= width), width)
            height, below = max(1, CELLS // width), width
            lines += [[]] * (-len(lines) % height)
            made += [(lines[at : at + height], width) for at in range(0, len(lines), height)]
        return self._grids(made, alone=False)

    def _fill(self, rows: Iterable[int], width: int) -> list[Line]:
        """Lines of at most `width` tokens: first fit, longest first."""
        lines, left = list[Line](), list[int]()
        for n in sorted(rows, key=lambda n: -self.lengths[n]):
            at = next((i for i, room in enumerate(left) if room >= self.lengths[n]), None)
            if at is None:
                at = len(lines)
                lines.append([])
                left.append(width)
            lines[at].append(n)
            left[at] -= self.lengths[n]
        return lines

    def _grids(self, grids: Iterable[tuple[list[Line], int]], alone: bool) -> Grids:
        """alone: every row has a line of its own."""
        grids = list(grids)
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        sizes = [(len(lines), width) for lines, width in grids]
        cells, at = sum(b * w for b, w in sizes), 0
        index, back = np.zeros(cells, dtype=np.int64), np.zeros(starts[-1], dtype=np.int64)
        first = np.concatenate([np.tile(np.arange(w), b) for b, w in sizes])  # padding sees itself
        for lines, width in grids:
            for line in lines:
                column = 0
                for n in line:
                    length = self.lengths[n]
                    cell = at + column + np.arange(length)
                    index[cell], back[starts[n] : starts[n + 1]] = np.arange(starts[n], starts[n + 1]), cell
                    first[cell] = column
                    column += length
                at += width
        sent = upload(np.concatenate([index, back, *([] if alone else [first])]), self.device)
        pieces = sent.split([cells, len(back), *([] if alone else [cells])])
        return Grids(sizes, *pieces)
