"""One forward for everything: rows in, logits at their scored positions out.

Three paths give the same numbers: packed attention without padding (models with plain full attention), padding on the
right (most other causal LMs, and gradient checkpointing), and one row at a time (models in which neighbours or padding
matter); each with a soft prompt before the task's rows, perhaps (ProMoT). `engine.trial` finds out which are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from holdfast.engine.pack import ATTENTION, Packed, TokenRow, pack
from holdfast.errors import ModelError

SOFT_PROMPT = "holdfast_prompt"  # name of the (p, D) parameter ProMoT hangs on the model


def inner(model: Any) -> Any:
    """The transformers model inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def can_pack(model: Any) -> bool:
    """True when every layer is plain full attention that takes a custom attention function, and it works (`trial`).

    Raises:
        ModelError: the model is not causal.
    """
    from holdfast.engine.trial import packs

    return packs(model) and _may_pack(inner(model))


def _may_pack(core: Any) -> bool:
    """What the configuration says: short rows show no window."""
    config = getattr(core.config, "text_config", None) or core.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ()
    softcap = getattr(config, "attn_logit_softcapping", None)
    return bool(
        getattr(core, "_supports_attention_backend", False)
        and not window
        and not softcap
        and all(k == "full_attention" for k in kinds)
    )


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
    from holdfast.engine.trial import packs

    packs(model)
    with _switched(model, name):
        yield


@contextmanager
def _switched(model: Any, name: str) -> Iterator[None]:
    config = inner(model).config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def forward(
    model: Any, rows: Sequence[TokenRow], *, hidden: bool = False, packing: bool = True
) -> tuple[Packed, torch.Tensor]:
    """Run `rows` once. Returns the packing and (N, V) logits at the scored positions, in row order.

    With `hidden`, (N, D) inputs of the output head come back instead of logits. Without `packing` rows are padded.

    Raises:
        ModelError: the model is not causal, or must see its rows one by one where its weights are cut over processes.
    """
    soft = getattr(inner(model), SOFT_PROMPT, None)
    prompts = [len(soft) if soft is not None and r.owner == r.source == "task" else 0 for r in rows]
    device = next(model.parameters()).device
    packed = pack(rows, device, prompts)
    way = _way(model, [len(r.ids) + n for r, n in zip(rows, prompts, strict=True)], packing)
    return packed, way(model, packed, prompts, soft, hidden)


def _way(model: Any, lengths: Sequence[int], packing: bool) -> Any:
    """The function that runs rows of these lengths."""
    from holdfast.engine.trial import is_cut, pads_right, together

    may, alone = can_pack(model), len(lengths) == 1
    if alone or max(lengths) <= together(model):
        if packing and may and not _recomputes(model):
            return _packed
        if alone or pads_right(model):
            return _padded
    if is_cut(model):  # every process must ask for as many forwards as the others
        what = f"{type(inner(model)).__name__} must see its rows one by one, but its weights are cut over processes."
        raise ModelError(what, "Use DDP, which leaves them whole.")
    return _one_by_one


def _packed(model: Any, p: Packed, prompts: list[int], soft: Any, hidden: bool) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": p.ids}
    if any(prompts):
        inputs = {"inputs_embeds": _embed(model, p, prompts, soft)[None]}
    with _switched(model, ATTENTION), _capture(model, hidden) as seen:
        out = model(
            **inputs,
            position_ids=p.positions,
            packed_layout=p.layout,
            logits_to_keep=p.where,
            use_cache=False,
        )
    return seen[0][0] if hidden else out.logits[0]


def _embed(model: Any, p: Packed, prompts: list[int], soft: torch.Tensor) -> torch.Tensor:
    """(T, D) embeddings with the soft prompt written before each row that has one."""
    parts, at = [], 0
    embeddings = inner(model).get_input_embeddings()(p.ids[0])
    for row, n in zip(p.rows, prompts, strict=True):
        end = at + n + len(row.ids)
        parts += [soft.to(embeddings.dtype)] if n else []
        parts.append(embeddings[at + n : end])
        at = end
    return torch.cat(parts)


def _padded(model: Any, p: Packed, prompts: list[int], soft: Any, hidden: bool) -> torch.Tensor:
    lengths = [len(r.ids) + n for r, n in zip(p.rows, prompts, strict=True)]
    width, starts = max(lengths), np.concatenate([[0], np.cumsum(lengths)])
    grid = torch.zeros((len(p.rows), width), dtype=torch.long, device=p.ids.device)
    mask = torch.zeros_like(grid)
    for i, n in enumerate(lengths):
        grid[i, :n] = p.ids[0, starts[i] : starts[i + 1]]
        mask[i, :n] = 1
    inputs: dict[str, Any] = {"input_ids": grid}
    if any(prompts):
        flat = _embed(model, p, prompts, soft)
        embedded = flat.new_zeros((len(p.rows), width, flat.shape[-1]))
        for i, n in enumerate(lengths):
            embedded[i, :n] = flat[starts[i] : starts[i + 1]]
        inputs = {"inputs_embeds": embedded}
    at = torch.as_tensor(starts[p.row], device=p.where.device)
    where = torch.as_tensor(p.row, device=p.where.device), p.where - at
    if len(p.rows) > 1:
        inputs["attention_mask"] = mask
    with _capture(model, hidden) as seen:
        out = model(**inputs, use_cache=False)
    return (seen[0] if hidden else out.logits)[where]


def _one_by_one(model: Any, p: Packed, prompts: list[int], soft: Any, hidden: bool) -> torch.Tensor:
    device = p.ids.device
    each = zip(p.rows, prompts, strict=True)
    return torch.cat([_padded(model, pack([row], device, [n]), [n], soft, hidden) for row, n in each])


@contextmanager
def _capture(model: Any, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Record what enters the output head (the last hidden states at the kept positions)."""
    seen: list[torch.Tensor] = []
    if not wanted:
        yield seen
        return
    head = inner(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
