"""One forward for everything: rows in, logits at their scored positions out.

Three paths give the same numbers: packed attention without padding (models with plain full attention), padding on the
right (most other causal LMs, and gradient checkpointing), and one row at a time (models in which neighbours or padding
matter); each with a soft prompt before the task's rows, perhaps (ProMoT), a prefix (`engine.prefix`) in the last two
alone. They stand in `engine.ways`, and `engine.trial` finds out which are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.engine.attention import ATTENTION, PACKS
from holdfast.engine.pack import Packed, TokenRow, pack
from holdfast.engine.prefix import check_mode, is_prefix
from holdfast.engine.replaced import Handed
from holdfast.engine.trial import asked, is_cut, packs, pads_right, together
from holdfast.engine.ways import (
    LAST,
    SOFT_PROMPT,
    States,
    asked_for,
    inner,
    run_one_by_one,
    run_packed,
    run_padded,
    spans,
    switched,
)
from holdfast.errors import ModelError


def can_pack(model: Any) -> bool:
    """True when every layer is attention that `engine.attention` knows and takes it, and it works (`trial`).

    Whoever asked for another attention by name (`ask`) gets that, and rows are padded.

    Raises:
        ModelError: the model is not causal.
    """
    return packs(model) and asked_for(model) in PACKS and _may_pack(model)


def _may_pack(model: Any) -> bool:
    """What the configuration says: short rows show no window. Each layer must hand on its own, and its soft cap."""
    core = inner(model)
    config = getattr(core.config, "text_config", None) or core.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ()
    cap = getattr(config, "attn_logit_softcapping", None) or None
    known = {"full_attention", "sliding_attention"} if window else {"full_attention"}
    if not getattr(core, "_supports_attention_backend", False) or not set(kinds) <= known:
        return False
    if not window and not cap:
        return True
    windows = [window if k == "sliding_attention" else None for k in kinds] or [window] * config.num_hidden_layers
    return Counter((w, c) for w, c, _ in asked(model)) == Counter((w, cap) for w in windows)


def _recomputes(model: Any) -> bool:
    """True when layers will run again in the backward, after the attention was switched back.

    That is gradient checkpointing, unless the host keeps the switch through its backward (`attention` around both).
    """
    kept = inner(model).config._attn_implementation == ATTENTION
    again = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return model.training and not kept and again


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Switch the attention function for the duration (read by the model at every call); the model is tried before."""
    packs(model)
    with switched(model, name):
        yield


@contextmanager
def through_backward(model: Any, rows: Sequence[TokenRow], packing: bool = True) -> Iterator[None]:
    """Around the forward and the backward of rows: gradient checkpointing runs layers again in the backward, where
    they must find the attention of the forward. Rows that will not be packed keep the model's own."""
    soft, prompts = _prompts(model, rows)
    lengths = [len(r.ids) + n for r, n in zip(rows, prompts, strict=True)]
    if packing and not (is_prefix(soft) and any(prompts)) and can_pack(model) and _may_share(model, lengths):
        with attention(model, ATTENTION):
            yield
    else:
        yield


def forward(
    model: Any, rows: Sequence[TokenRow], *, hidden: bool = False, packing: bool = True
) -> tuple[Packed, torch.Tensor]:
    """Run `rows` once. Returns the packing and (N, V) logits at the scored positions, in row order.

    With `hidden`, (N, D) inputs of the output head come back instead of logits. Without `packing` rows are padded.

    Raises:
        ModelError: the model is not causal, or must see its rows one by one where its weights are cut over processes.
    """
    packed, logits, states, _ = forward_states(model, rows, (LAST,) if hidden else (), packing=packing)
    return packed, states[LAST] if hidden else logits


def forward_states(
    model: Any, rows: Sequence[TokenRow], layers: Sequence[int], *, packing: bool = True
) -> tuple[Packed, torch.Tensor, States, Handed]:
    """As `forward`, with the hidden states of `layers` and what replaced modules handed out beside the logits.

    layers: decoder blocks from 0 (what each gives), or LAST (what enters the output head, behind the final norm).

    Returns: the packing, (N, V) logits, {layer: (N, D)}, all at the scored positions; {key: [(T, ...)]} at all tokens.
    """
    soft, prompts = _prompts(model, rows)
    device = next(model.parameters()).device
    packed = pack(rows, device, spans(prompts, soft))
    lengths = packed.layout.lengths
    if is_prefix(soft) and any(prompts):  # a packed row has one beginning
        check_mode(inner(model))
        packing, lengths = False, [n + p for n, p in zip(lengths, prompts, strict=True)]
    way = _way(model, lengths, packing)
    return packed, *way(model, packed, prompts, soft, layers)


def _prompts(model: Any, rows: Sequence[TokenRow]) -> tuple[Any, list[int]]:
    """The soft prompt or None, and how much of it stands before each row."""
    soft = getattr(inner(model), SOFT_PROMPT, None)
    return soft, [len(soft) if soft is not None and r.of_task else 0 for r in rows]


def _may_share(model: Any, lengths: Sequence[int]) -> bool:
    return len(lengths) == 1 or max(lengths) <= together(model)


def _way(model: Any, lengths: Sequence[int], packing: bool) -> Any:
    """The function that runs rows of these lengths."""
    may, alone = can_pack(model), len(lengths) == 1
    if _may_share(model, lengths):
        if packing and may and not _recomputes(model):
            return run_packed
        if alone or pads_right(model):
            return run_padded
    if is_cut(model):  # every process must ask for as many forwards as the others
        what = f"{type(inner(model)).__name__} must see its rows one by one, but its weights are cut over processes."
        raise ModelError(what, "Use DDP, which leaves them whole.")
    return run_one_by_one
