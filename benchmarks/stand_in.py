"""A stand-in for torch's attention of rows of any length, where there is no GPU: one operator, computed by a loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def _rows(q: torch.Tensor, k: torch.Tensor, ends: torch.Tensor, scale: float, back: int) -> Iterator[Any]:
    """(its place, (H, L, L) shares in fp32) of each row: tokens see themselves, and up to `back` before (-1: all)."""
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        at = torch.arange(b - a)
        sees = at[None] <= at[:, None]
        if back >= 0:
            sees &= at[:, None] - at[None] <= back
        scores = torch.einsum("ihd,jhd->hij", q[a:b].float(), k[a:b].float()) * scale
        yield slice(a, b), scores.masked_fill(~sees, float("-inf")).softmax(-1)


@torch.library.custom_op("holdfast_stand_in::varlen_attn", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, scale: float, back: int, longest: int
) -> torch.Tensor:
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q) and ends.diff().max() == longest
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return torch.cat(
        [torch.einsum("hij,jhd->ihd", share, v[row].float()) for row, share in _rows(q, k, ends, scale, back)]
    ).to(q.dtype)


@torch.library.custom_op("holdfast_stand_in::varlen_attn_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, scale: float, back: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shared = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    dq, dk, dv = [], [], []
    for row, share in _rows(q, wide_k, ends, scale, back):
        g = grad[row].float()
        dv.append(torch.einsum("hij,ihd->jhd", share, g))
        d = torch.einsum("ihd,jhd->hij", g, wide_v[row].float())
        d = share * (d - (d * share).sum(-1, keepdim=True)) * scale
        dq.append(torch.einsum("hij,jhd->ihd", d, wide_k[row].float()))
        dk.append(torch.einsum("hij,ihd->jhd", d, q[row].float()))
    narrow = [torch.cat(x).unflatten(1, (-1, shared)).sum(2).to(q.dtype) for x in (dk, dv)]
    return torch.cat(dq).to(q.dtype), narrow[0], narrow[1]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.back, _longest = inputs
    ctx.save_for_backward(*tensors)


_forward.register_autograd(
    lambda ctx, grad: (*_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.back), None, None, None, None),
    setup_context=_keep,
)


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """As `torch.nn.attention.varlen.varlen_attn`, and stricter: what that kernel would misread fails."""
    assert cu_seq_q is cu_seq_k and type(max_q) is type(max_k) is int and max_q == max_k
    assert query.dtype == key.dtype == value.dtype and query.shape[2] % 8 == 0
    assert query.shape[2] == key.shape[2] == value.shape[2] and len(query) == len(key) == len(value)
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert scale is not None and window_size[1] == 0  # nothing that comes later
    return _forward(query, key, value, cu_seq_q, scale, window_size[0], max_q)
