"""A prefix tree in lines of one width, for a device that is fast but slow to start: few forwards of few shapes.

A line is a run of the tree's nodes in depth-first order, behind the ancestors of the first of them. So no line needs
another, nothing is kept between forwards, and all that they read is laid out and sent before the first of them.

Legend: B lines of a forward, W their width, H heads, D head width, K cells with logits, P scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from holdfast.engine.attention import MASKED, Wants, attend, only_plain, register
from holdfast.engine.layout import upload
from holdfast.engine.tree import Tree

LINES_ATTENTION = "holdfast_lines"
WIDTHS = tuple(1 << n for n in range(8, 15))  # 256 to 16,384, where a mask has 512 MiB in bf16
COSTLY = 4096  # ours: a guess at the width at which attention takes as long as the products with the weights


@dataclass
class Lines:
    """The lines of one forward, one behind the other.

    ids, positions: (1, B*W); end: (B, W) one past the last column of a cell's subtree; keep: (K,) cells with logits;
    row, target: (P,) where among those a scored token is told, and the token; request, rows: (P,) on the host whose
    it is, and `row`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    end: torch.Tensor
    keep: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor
    request: np.ndarray
    rows: np.ndarray
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(B, 1, W, W) to add to scores. j is i or its ancestor exactly if j <= i < end of j; padding sees itself."""
        key = window, dtype
        if key not in self._masks:
            at = torch.arange(self.end.shape[1], device=self.end.device)
            sees = (at <= at[:, None]) & (at[:, None] < self.end[:, None])
            if window is not None:
                depth = self.positions.view(self.end.shape)
                sees &= depth[:, :, None] - depth[:, None] < window
            self._masks[key] = torch.zeros(sees.shape, dtype=dtype, device=at.device).masked_fill_(~sees, -torch.inf)
        return self._masks[key][:, None]


def cut(tree: Tree, width: int) -> list[range]:
    """The nodes in their order, in the fewest runs that fit into `width` behind the ancestors of their first node.

    From all places that a run may end at, the next one begins where it reaches furthest.
    """
    reach = np.arange(len(tree)) + width - np.asarray(tree.depth)  # one past the last node of a run that begins there
    starts = [1]
    while (stop := reach[starts[-1]]) < len(tree):
        starts.append(starts[-1] + 1 + int(reach[starts[-1] + 1 : stop + 1].argmax()))
    return [range(a, b) for a, b in pairwise([*starts, len(tree)])]


def choose(tree: Tree, cells: int) -> tuple[int, list[range]]:
    """(width, runs) of the least cost: narrow lines repeat more ancestors, wide ones have more attention.

    A line has no more than `cells` cells, if that is possible.
    """
    fit = [width for width in WIDTHS if width > max(tree.depth)]
    tries = [(width, cut(tree, width)) for width in fit if width <= max(cells, fit[0])]
    return min(tries, key=lambda t: sum(heights(len(t[1]), t[0], cells)) * t[0] * (1 + t[0] / COSTLY))


def heights(num_lines: int, width: int, cells: int) -> list[int]:
    """Lines of each forward: `cells` cells, or one line if it has more; the last in quarters of it, for few shapes."""
    most = max(1, cells // width)
    quarter, left = max(1, most // 4), num_lines % most
    return [most] * (num_lines // most) + ([min(most, -(-left // quarter) * quarter)] if left else [])


def lay(tree: Tree, cells: int, device: Any) -> list[Lines]:
    """The forwards of a tree, all of them on the device; see `heights` for their size."""
    width, runs = choose(tree, cells)
    tall = heights(len(runs), width, cells)
    grid, asked = upload(_grid(tree, runs, width, sum(tall)), device), _asked(tree, runs, width)
    ends = np.cumsum(tall) * width  # cells
    told = np.split(asked, np.searchsorted(asked[:, 0], ends[:-1]))  # of each forward
    kept = [np.unique(each[:, 0], return_inverse=True) for each in told]
    begins = ends - np.asarray(tall) * width
    small = [x for (keep, row), each, at in zip(kept, told, begins, strict=True) for x in (keep - at, row, each[:, 2])]
    sent = upload(np.concatenate(small), device).split([len(x) for x in small])
    out = []
    for n, (ids, positions, end) in enumerate(grid.split(tall, dim=1)):
        keep, row, target = sent[3 * n : 3 * n + 3]
        request, rows = told[n][:, 1], kept[n][1]
        out.append(Lines(ids.view(1, -1), positions.view(1, -1), end, keep, row, target, request, rows))
    return out


def _grid(tree: Tree, runs: list[range], width: int, height: int) -> np.ndarray:
    """(3, height, W): token, depth and one past the last column of the subtree of each cell."""
    token, depth, end = (np.asarray(x) for x in (tree.token, tree.depth, tree.end))
    grid = np.zeros((3, height, width), dtype=np.int64)
    grid[2] = np.arange(width) + 1
    for line, run in enumerate(runs):
        nodes = np.array([*tree.above(run.start), *run])
        grid[:, line, : len(nodes)] = token[nodes], depth[nodes], np.searchsorted(nodes, end[nodes])
    return grid


def _asked(tree: Tree, runs: list[range], width: int) -> np.ndarray:
    """(P, 3): cell, request and token of everything scored, in the order of the cells."""
    asked = np.array([(n, r, t) for n in sorted(tree.wanted) for r, t in tree.wanted[n]], dtype=np.int64)
    starts = np.array([run.start for run in runs])
    line = np.searchsorted(starts, asked[:, 0], side="right") - 1
    asked[:, 0] += line * width + np.asarray(tree.depth)[starts[line]] - starts[line]
    return asked


def lines_attention(
    module: Any,
    query: torch.Tensor,  # (1, H, B*W, D)
    key: torch.Tensor,  # (1, Hkv, B*W, D)
    value: torch.Tensor,  # (1, Hkv, B*W, D)
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_lines: Lines | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within lines; returns (1, B*W, H, D)."""
    if tree_lines is None:
        raise RuntimeError(f"Attention {LINES_ATTENTION!r} needs tree_lines; score through holdfast.measure.scorer.")
    only_plain(LINES_ATTENTION, attention_mask, {k: v for k, v in more.items() if k not in MASKED})
    wants = Wants(scaling, dropout, *(more.get(name) for name in MASKED))
    q, k, v = (x[0].unflatten(1, tree_lines.end.shape).transpose(0, 1) for x in (query, key, value))
    out = attend(q, k, v, tree_lines.mask(wants.window, query.dtype), wants)
    return out.transpose(1, 2).flatten(0, 1)[None], None


register(LINES_ATTENTION, lines_attention)
