"""Rows of tokens, packed into one forward without padding and without attention across rows.

Legend: B rows, T tokens of the packed row, N scored positions, V vocabulary, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ATTENTION = "holdfast_packed"
# what layers hand to any attention and plain full attention does not read
UNREAD = frozenset("position_ids use_cache logits_to_keep cache_position output_attentions return_dict".split())


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One tokenised example.

    Attributes:
        ids: (T,) token ids.
        scored: (T,) bool, True where the token is a target; the first is never one.
        owner: "task" if its targets carry the task's cross-entropy, else the method that asked for the row.
        source: where it came from, for the realised mix.
        gold: (T,) bool, True where the target is part of a right answer; for methods that tell these apart.
        targets: (T,) ids to be predicted where `scored`; None: `ids`, what is read is what is predicted.
        numbers: named (T,) float arrays along its tokens; `View.number` gives them at the scored positions.
        group: rows of one owner and group (a pair) stand in one micro-batch when they are of one step.
        key: identity of what is read and where it is scored; a stored teacher finds its answers by it.
    """

    ids: np.ndarray
    scored: np.ndarray
    owner: str = "task"
    source: str = "task"
    gold: np.ndarray | None = None
    targets: np.ndarray | None = None
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    group: str | None = None

    @property
    def key(self) -> bytes:
        return self.ids.tobytes() + self.scored.tobytes()

    @property
    def num_scored(self) -> int:
        return int(self.scored.sum())

    @property
    def predicted(self) -> np.ndarray:
        """(T,) ids to be predicted where `scored`."""
        return self.ids if self.targets is None else self.targets

    def cut(self, most: int) -> TokenRow:
        """The first `most` tokens, with all that belongs to them."""
        if len(self.ids) <= most:
            return self
        gold, targets = (None if a is None else a[:most] for a in (self.gold, self.targets))
        numbers = {name: a[:most] for name, a in self.numbers.items()}
        return replace(
            self, ids=self.ids[:most], scored=self.scored[:most], gold=gold, targets=targets, numbers=numbers
        )


def token_row(ids: Sequence[int] | np.ndarray, start: int, owner: str = "task", source: str = "task") -> TokenRow:
    """A row whose targets are `ids[start:]`; start >= 1."""
    array = np.asarray(ids, dtype=np.int64)
    scored = np.zeros(len(array), dtype=bool)
    scored[max(1, start) :] = True
    return TokenRow(array, scored, owner, source)


@dataclass
class Layout:
    """Where each packed token stands in (rows, width) blocks of rows of similar length.

    blocks: per block (index (B*L,), real (B*L, 1) bool, B, L); back: (T,) position of each token in the joined blocks.
    """

    blocks: list[tuple[torch.Tensor, torch.Tensor, int, int]]
    back: torch.Tensor


@dataclass
class Packed:
    """One packed forward: ids, positions (1, T); where (N,) scored positions; target (N,); row (N,) of its row."""

    ids: torch.Tensor
    positions: torch.Tensor
    where: torch.Tensor
    target: torch.Tensor
    row: np.ndarray
    layout: Layout
    rows: Sequence[TokenRow]


def pack(rows: Sequence[TokenRow], device: Any = "cpu", prompts: Sequence[int] | None = None) -> Packed:
    """Lay `rows` end to end. `prompts[i]` soft-prompt tokens are put before row i (their ids are 0, never scored)."""
    prompts = prompts or [0] * len(rows)
    lengths = [len(r.ids) + p for r, p in zip(rows, prompts, strict=True)]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    ids = np.zeros(sum(lengths), dtype=np.int64)
    where, target, row = [], [], []
    for n, (r, p, s) in enumerate(zip(rows, prompts, starts, strict=True)):
        ids[s + p : s + p + len(r.ids)] = r.ids
        at = np.flatnonzero(r.scored)
        where.append(s + p + at - 1)
        target.append(r.predicted[at])
        row.append(np.full(len(at), n))
    positions = np.concatenate([np.arange(n) for n in lengths])
    to = lambda a: torch.as_tensor(a, device=device)  # noqa: E731
    return Packed(
        to(ids)[None],
        to(positions)[None],
        to(np.concatenate(where)),
        to(np.concatenate(target)),
        np.concatenate(row),
        layout(starts, lengths, device),
        rows,
    )


def layout(starts: np.ndarray, lengths: Sequence[int], device: Any) -> Layout:
    """Group rows of similar length (each block at most a third padding) and index them."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    groups: list[list[int]] = []
    for n in order:
        if groups and lengths[n] * 1.5 >= lengths[groups[-1][0]]:
            groups[-1].append(n)
        else:
            groups.append([n])
    blocks, back, offset = [], np.zeros(sum(lengths), dtype=np.int64), 0
    for group in groups:
        width = lengths[group[0]]
        index = np.zeros((len(group), width), dtype=np.int64)
        real = np.zeros((len(group), width), dtype=bool)
        for i, n in enumerate(group):
            span = np.arange(starts[n], starts[n] + lengths[n])
            index[i, : lengths[n]], real[i, : lengths[n]] = span, True
            back[span] = offset + i * width + np.arange(lengths[n])
        offset += index.size
        flat, mask = (
            torch.as_tensor(index.ravel(), device=device),
            torch.as_tensor(real.ravel(), device=device),
        )
        blocks.append((flat, mask[:, None], len(group), width))
    return Layout(blocks, torch.as_tensor(back, device=device))


class _Spread(torch.autograd.Function):
    """x (T, C) -> rows `index` of x. Each token is real in one place, so the backward is a gather, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.back = layout.back
        return x.index_select(0, torch.cat([b[0] for b in layout.blocks]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].index_select(0, ctx.back), None


class _Gather(torch.autograd.Function):
    """The inverse of _Spread; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.back)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        index = torch.cat([b[0] for b in ctx.layout.blocks])
        real = torch.cat([b[1] for b in ctx.layout.blocks])
        return grads[0].index_select(0, index) * real, None


def only_plain(name: str, mask: torch.Tensor | None, more: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a layer asks for more than plain full attention: a window, a cap, sinks, a mask."""
    asked = [k for k, v in more.items() if not (k in UNREAD or v is None or v is (k == "is_causal"))]
    if asked or mask is not None:
        raise RuntimeError(f"Attention {name!r} knows no {', '.join(asked) or 'mask'}.")


def packed_attention(
    module: Any,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, Hkv, T, D)
    value: torch.Tensor,  # (1, Hkv, T, D)
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: Layout | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each packed row; returns (1, T, H, D). Padding follows a row: causality hides it."""
    if packed_layout is None:
        raise RuntimeError(f"Attention {ATTENTION!r} needs packed_layout; call the model through holdfast.engine.")
    only_plain(ATTENTION, attention_mask, more)
    spread = [_Spread.apply(x[0].transpose(0, 1).flatten(1), packed_layout) for x in (query, key, value)]
    heads = [query.shape[1], key.shape[1], value.shape[1]]
    outs, at = [], 0
    for _index, _real, b, width in packed_layout.blocks:
        q, k, v = (
            s[at : at + b * width].view(b, width, h, -1).transpose(1, 2) for s, h in zip(spread, heads, strict=True)
        )
        at += b * width
        outs.append(_attend(q, k, v, dropout, scaling).transpose(1, 2).reshape(b * width, -1))
    joined = _Gather.apply(torch.cat(outs) if len(outs) > 1 else outs[0], packed_layout)
    return joined.view(1, joined.shape[0], heads[0], -1), None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, scale: float | None) -> torch.Tensor:
    """(B, H, L, D) causal attention.

    On CPU the fused backward in bf16 is 3 to 10 times slower than in fp32 for rows of fewer than some 500 tokens
    (docs/performance.md), so those are computed in fp32, where autocast would choose bf16 too.
    """
    settings: dict[str, Any] = {"dropout_p": dropout, "is_causal": True, "scale": scale}
    settings["enable_gqa"] = q.shape[1] != k.shape[1]
    if q.device.type != "cpu" or q.shape[2] >= 512 or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, **settings)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **settings).to(q.dtype)


def register(name: str, function: Callable[..., Any]) -> None:
    """Let models be switched to `function` by `forward.attention(model, name)`."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


register(ATTENTION, packed_attention)
