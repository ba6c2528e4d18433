"""Attention of packed rows: which function computes it is chosen here, and nowhere else.

| way | where | what it is |
|---|---|---|
| `flash` | CUDA, flash-attn installed, 16 bits | its kernel for rows of any length, through transformers |
| `varlen` | CUDA, 16 bits | torch's own kernel for rows of any length, `torch.nn.attention.varlen` |
| `fixed` | the rest of CUDA | scaled-dot-product attention on at most three shapes, without cuDNN's plans |
| `blocks` | the rest | scaled-dot-product attention on rows of similar length: on a CPU a new shape costs nothing |

All give the same: a token sees itself and those before it in its own row, no further back than the layer's window.

Legend: T tokens of the packed row, H heads, D head width, B lines of a grid, W their width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from holdfast.engine.layout import Grids, Layout

ATTENTION = "holdfast_packed"
# what layers hand to any attention and plain full attention does not read
UNREAD = frozenset("position_ids use_cache logits_to_keep cache_position output_attentions return_dict".split())
MASKED = ("sliding_window", "softcap", "s_aux")  # what packed attention reads beside: window, cap, sinks
PACKS = (None, "sdpa", "flash_attention_2")  # what a user may name and still have rows packed
HEAD = 256  # the widest head of the kernels for rows of any length
_only: ContextVar[tuple[str | None, Callable[..., torch.Tensor] | None]] = ContextVar("only", default=(None, None))


@dataclass(frozen=True)
class Wants:
    """What a layer asks of its attention.

    scale: of the scores, None is D ** -0.5; dropout: of the shares; window: tokens that one sees, itself among them;
    cap: scores are cap * tanh(score / cap); sinks: (H,) a score that is no token's.
    """

    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None
    cap: float | None = None
    sinks: torch.Tensor | None = None


# ---- the choice


@contextmanager
def only(way: str, kernel: Callable[..., torch.Tensor] | None = None) -> Iterator[None]:
    """Take this way, for comparisons; `kernel` stands in for torch's `varlen_attn` where there is no GPU."""
    token = _only.set((way, kernel))
    try:
        yield
    finally:
        _only.reset(token)


def choose(device: torch.device, dtype: torch.dtype, head: int, wants: Wants, asked: str | None = None) -> str:
    """The way of a layer with heads of width `head` that is computed in `dtype`; `asked` is a name of `PACKS`."""
    way = _only.get()[0] or ("fixed" if asked == "sdpa" and device.type == "cuda" else _best(device))
    if way in ("fixed", "blocks"):
        return way
    half = dtype in (torch.bfloat16, torch.float16) or device.type != "cuda"
    plain = way == "flash" or (not wants.dropout and wants.cap is None)
    return way if half and plain and head <= HEAD and wants.sinks is None else "fixed"


def _best(device: torch.device) -> str:
    if device.type != "cuda":
        return "blocks"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "fixed"
    return "flash" if _has_flash() else "varlen" if _varlen() else "fixed"


def said(device: torch.device) -> str:
    """What a model in bf16 gets there, for `doctor`."""
    return choose(device, torch.bfloat16, 64, Wants())


@cache
def _has_flash() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


@cache
def _varlen() -> Callable[..., torch.Tensor] | None:
    """torch's kernel, where it knows windows and scales (2.11 and later)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "scale"} <= set(known) else None


# ---- the function that models call


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
    """Causal attention inside each packed row; returns (1, T, H, D)."""
    if packed_layout is None:
        raise RuntimeError(f"Attention {ATTENTION!r} needs packed_layout; call the model through holdfast.engine.")
    only_plain(ATTENTION, attention_mask, {k: v for k, v in more.items() if k not in MASKED})
    wants = Wants(scaling, dropout, *(more.get(name) for name in MASKED))
    packed_layout.said.append((wants.window, wants.cap, wants.sinks is not None))
    dtype = _computed_in(query)
    way = choose(query.device, dtype, query.shape[-1], wants, packed_layout.asked)
    if way in ("fixed", "blocks"):
        return _by_grids(query, key, value, getattr(packed_layout, way), wants), None
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    run = _by_flash if way == "flash" else _by_varlen
    return run(q, k, v, packed_layout, wants)[None], None


def _computed_in(x: torch.Tensor) -> torch.dtype:
    """What a product of `x` would be computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def only_plain(name: str, mask: torch.Tensor | None, more: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a layer asks for more than plain full attention: a window, a cap, sinks, a mask."""
    asked = [k for k, v in more.items() if not (k in UNREAD or v is None or v is (k == "is_causal"))]
    if asked or mask is not None:
        raise RuntimeError(f"Attention {name!r} knows no {', '.join(asked) or 'mask'}.")


# ---- rows of any length: q (T, H, D), k and v (T, Hkv, D)


def _by_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Layout, wants: Wants) -> torch.Tensor:
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    width = v.shape[-1]
    out = _flash_attention_forward(
        q[None], k[None], _widened(v, q.shape[-1])[None], None, len(q), True, wants.dropout, softmax_scale=wants.scale,
        sliding_window=wants.window, softcap=wants.cap, cu_seq_lens_q=rows.ends, cu_seq_lens_k=rows.ends,
        max_length_q=rows.longest, max_length_k=rows.longest, attn_implementation="flash_attention_2",
    )  # fmt: skip
    return out[0, ..., :width]


def _by_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Layout, wants: Wants) -> torch.Tensor:
    """The kernel asks for heads of a multiple of 8, and its window does not count the token itself."""
    width, own = v.shape[-1], q.shape[-1]
    q, k, v = (_widened(x, 8 * math.ceil(own / 8)) for x in (q, k, v))
    kernel: Any = _only.get()[1] or _varlen()
    more = {"enable_gqa": True} if k.shape[1] != q.shape[1] and _shares_heads(kernel) else {}
    out = kernel(
        q, k, v, rows.ends, rows.ends, rows.longest, rows.longest, scale=wants.scale or own**-0.5,
        window_size=(-1 if wants.window is None else wants.window - 1, 0), **more,
    )  # fmt: skip
    return out[..., :width]


def _widened(x: torch.Tensor, head: int) -> torch.Tensor:
    return x if x.shape[-1] == head else F.pad(x, (0, head - x.shape[-1]))


@cache
def _shares_heads(kernel: Callable[..., torch.Tensor]) -> bool:
    """Whether it must be told of key heads that several query heads share; before torch 2.13 it looked for itself."""
    return "enable_gqa" in inspect.signature(kernel).parameters


# ---- grids


class _Spread(torch.autograd.Function):
    """x (T, C) -> its cells in each grid, (B * W, C). A token stands in one cell, so the backward is a gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grids: Grids) -> tuple[torch.Tensor, ...]:
        ctx.back = grids.back
        return x.index_select(0, grids.index).split([b * w for b, w in grids.sizes])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _join(grads).index_select(0, ctx.back), None


class _Gather(torch.autograd.Function):
    """The inverse of _Spread; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, grids: Grids, *cells: torch.Tensor) -> torch.Tensor:
        ctx.grids = grids
        return _join(cells).index_select(0, grids.back)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad, grids = grads[0], ctx.grids
        out = grad.new_zeros((len(grids.index), grad.shape[1])).index_copy_(0, grids.back, grad)
        return None, *out.split([b * w for b, w in grids.sizes])


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _by_grids(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grids: Grids, wants: Wants) -> torch.Tensor:
    """(1, T, H, D) from (1, H, T, D). Padding follows a row or sees itself alone: no token of a row sees it."""
    heads, dtype = [x.shape[1] for x in (query, key, value)], query.dtype
    if all(_short(query, width) for _, width in grids.sizes):
        query, key, value = query.float(), key.float(), value.float()  # once, not once a grid
    spread = [_Spread.apply(x[0].transpose(0, 1).flatten(1), grids) for x in (query, key, value)]
    masks, outs = grids.masks(wants.window, query.dtype), []
    for mask, (b, width), *cells in zip(masks, grids.sizes, *spread, strict=True):
        q, k, v = (c.view(b, width, h, -1).transpose(1, 2) for c, h in zip(cells, heads, strict=True))
        outs.append(attend(q, k, v, mask, wants).transpose(1, 2).reshape(b * width, -1))
    joined = _Gather.apply(grids, *outs)
    return joined.view(1, len(joined), heads[0], -1).to(dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, wants: Wants) -> torch.Tensor:
    """(B, H, W, D) causal attention."""
    if wants.cap is not None or wants.sinks is not None:
        return _by_hand(q, k, v, mask, wants)
    on_cpu = q.device.type == "cpu"
    if mask is not None and not on_cpu and k.shape[1] != q.shape[1]:  # with a mask only the CPU's kernel shares heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    settings: dict[str, Any] = {"dropout_p": wants.dropout, "is_causal": mask is None, "scale": wants.scale}
    settings["enable_gqa"] = q.shape[1] != k.shape[1]
    if not _short(q, q.shape[2]):
        with no_plans(q.device):
            return F.scaled_dot_product_attention(q, k, v, mask, **settings)
    with torch.autocast("cpu", enabled=False):
        mask = None if mask is None else mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **settings).to(q.dtype)


def _short(q: torch.Tensor, width: int) -> bool:
    """Whether to compute in fp32 where autocast would choose bf16.

    On a CPU the fused backward in bf16 is 3 to 10 times slower than in fp32 for rows of fewer than some 500 tokens
    (docs/performance.md).
    """
    return q.device.type == "cpu" and width < 512 and q.requires_grad


def no_plans(device: torch.device) -> Any:
    """cuDNN would plan its kernel anew for every shape it has not seen, for about a second."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, wants: Wants
) -> torch.Tensor:
    """What scaled-dot-product attention cannot: scores capped by tanh, and a sink in the softmax that is no token."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * (wants.scale or q.shape[-1] ** -0.5)
    if wants.cap is not None:
        scores = wants.cap * torch.tanh(scores / wants.cap)
    if mask is None:
        mask = scores.new_full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
    scores = scores.float() + mask
    if wants.sinks is not None:
        sinks = wants.sinks.float().view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    share = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    return F.dropout(share, wants.dropout) @ v


def register(name: str, function: Callable[..., Any]) -> None:
    """Let models be switched to `function` by `forward.attention(model, name)`."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


register(ATTENTION, packed_attention)
