"""A prefix tree of token sequences, and attention in which a token sees exactly its ancestors.

Legend: B tiles, L queries of a tile, K keys of a tile, T new tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from holdfast.engine.attention import only_plain, register

TREE_ATTENTION = "holdfast_tree"
TILE = 64  # queries of a tile: fewer see fewer keys in vain, more make larger matrix products
UNEVEN = 1.5  # tiles go through one kernel call while that computes at most so many times their keys


@dataclass
class Tree:
    """Prefix tree of token sequences in depth-first order; node 0 is the empty root."""

    token: list[int] = field(default_factory=lambda: [-1])
    parent: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [-1])
    end: list[int] = field(default_factory=list)  # one past the last node of the subtree
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # node -> (request, target token)

    def __len__(self) -> int:
        return len(self.token)

    def above(self, node: int) -> list[int]:
        """The ancestors of `node` from the top, without the root."""
        out = []
        while (node := self.parent[node]) > 0:
            out.append(node)
        return out[::-1]


def grow(sequences: Sequence[tuple[list[int], int]]) -> Tree:
    """Build the tree. Each sequence is (context + continuation tokens, number of context tokens >= 1)."""
    tree, path, before = Tree(), [0], []
    for n in sorted(range(len(sequences)), key=lambda i: sequences[i][0][:-1]):
        ids, start = sequences[n]
        inputs = ids[:-1]
        same = 0
        while same < min(len(before), len(inputs)) and before[same] == inputs[same]:
            same += 1
        del path[same + 1 :]
        for depth in range(same, len(inputs)):
            tree.token.append(inputs[depth])
            tree.parent.append(path[-1])
            tree.depth.append(depth)
            path.append(len(tree) - 1)
        for t in range(start, len(ids)):
            tree.wanted.setdefault(path[t], []).append((n, ids[t]))
        before = inputs
    tree.end = [i + 1 for i in range(len(tree))]
    for node in range(len(tree) - 1, 0, -1):
        tree.end[tree.parent[node]] = max(tree.end[tree.parent[node]], tree.end[node])
    return tree


def parts(tree: Tree, most: int, again: int) -> list[range]:
    """Cut the nodes, in their order, into ranges of half of `most` to `most` nodes that need nothing of each other.

    Each repeats the ancestors of its first node. The cut is where those are fewest; it is not made if they are more
    than `again`, so a range may be longer.
    """
    step = max(1, 3 * most // 4)
    starts, target = [1], 1 + step
    while target + most // 4 < len(tree):
        near = range(target - most // 4, target + most // 4 + 1)
        at = min(near, key=lambda node: (tree.depth[node], abs(node - target)))
        if tree.depth[at] <= again:
            starts.append(at)
            target = at
        target += step
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(tree)], strict=True) if a < b]


def slices(tree: Tree, part: range, most: int, scored: int) -> Iterator[list[int]]:
    """Cut a part into forwards of at most `most` nodes and `scored` nodes with logits.

    The ancestors of its first node come first. What a later slice needs from before it are the ancestors of its own
    first node: an earlier ancestor of a later node is one of those too.
    """
    nodes, kept = [], 0
    for node in (*tree.above(part.start), *part):
        wanted = node in tree.wanted and node >= part.start
        if len(nodes) == most or (kept == scored and wanted):
            yield nodes
            nodes, kept = [], 0
        nodes.append(node)
        kept += wanted
    if nodes:
        yield nodes


@dataclass(frozen=True)
class Tiles:
    """Neighbouring tiles of equal length that go through one kernel call.

    rows: the new tokens of the tiles, B * L of them; keys: (B*K,) what each tile sees of all keys, padded;
    mask: (B, 1, L, K), 0 where a token sees a key and -inf where not.
    """

    rows: slice
    keys: torch.Tensor
    mask: torch.Tensor


def tiles(
    tree: Tree, before: Sequence[int], nodes: Sequence[int], held: int, dtype: torch.dtype, device: Any
) -> list[Tiles]:
    """Attention of `nodes` (in their order) below the cached `before` (their ancestors).

    `held` cached keys before those are for all to see.

    j is i or an ancestor of i exactly if j <= i < end of j. So a tile of queries needs the keys that do not end before
    its first query, which are few: most of what was computed before belongs to other branches.
    """
    order = np.array([0] * held + [*before, *nodes])  # node of each key; what all see stands as the root
    end = np.asarray(tree.end)[order]
    out: list[Tiles] = []
    group: list[tuple[np.ndarray, np.ndarray]] = []
    first = 0

    def flush(stop: int) -> None:
        width = max(len(keys) for _, keys in group)
        index = np.zeros((len(group), width), dtype=np.int64)
        sees = np.zeros((len(group), len(group[0][0]), width), dtype=bool)
        for n, (rows, keys) in enumerate(group):
            index[n, : len(keys)] = keys
            sees[n, :, : len(keys)] = (order[keys] <= rows[:, None]) & (rows[:, None] < end[keys])
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(torch.from_numpy(~sees), -torch.inf)
        keys = torch.from_numpy(index.ravel()).to(device)
        out.append(Tiles(slice(first, stop), keys, mask[:, None].to(device)))

    for at in range(0, len(nodes), TILE):
        rows = np.array(nodes[at : at + TILE])
        keys = np.flatnonzero((order <= rows[-1]) & (end > rows[0]))
        sizes = [len(k) for _, k in group] + [len(keys)]
        if group and (len(rows) < TILE or max(sizes) * len(sizes) > UNEVEN * sum(sizes)):
            flush(at)
            group, first = [], at
        group.append((rows, keys))
    flush(len(nodes))
    return out


def tree_attention(
    module: Any,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, Hkv, held + T, D)
    value: torch.Tensor,  # (1, Hkv, held + T, D)
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_tiles: Sequence[Tiles] = (),
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of new tokens over cached and new ones, tile by tile; returns (1, T, H, D)."""
    if not tree_tiles:
        raise RuntimeError(f"Attention {TREE_ATTENTION!r} needs tree_tiles; score through holdfast.measure.scorer.")
    only_plain(TREE_ATTENTION, attention_mask, more)
    outs = []
    for tile in tree_tiles:
        b, _one, length, width = tile.mask.shape
        q = query[0, :, tile.rows].unflatten(1, (b, length)).transpose(0, 1)
        k, v = (x[0].index_select(1, tile.keys).unflatten(1, (b, width)).transpose(0, 1) for x in (key, value))
        if q.device.type != "cpu" and k.shape[1] != q.shape[1]:  # with a mask only the CPU's fused kernel shares heads
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        gqa = k.shape[1] != q.shape[1]
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=tile.mask, scale=scaling, enable_gqa=gqa)
        outs.append(got.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None], None


register(TREE_ATTENTION, tree_attention)
