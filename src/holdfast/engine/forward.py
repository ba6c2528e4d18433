"""One forward for everything: rows in, logits at their scored positions out.

Three paths give the same numbers: packed attention without padding (models with plain full attention), padding on the
right (most other causal LMs, and gradient checkpointing), and one row at a time (models in which neighbours or padding
matter); each with a soft prompt before the task's rows, perhaps (ProMoT). `engine.trial` finds out which are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from holdfast.engine.pack import ATTENTION, Packed, TokenRow, pack
from holdfast.errors import ModelError

LAST = -1  # the layer whose states enter the output head
States = dict[int, torch.Tensor]  # layer -> (N, D)
Outcome = tuple[torch.Tensor, States]  # logits and states
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
    packed, logits, states = forward_states(model, rows, (LAST,) if hidden else (), packing=packing)
    return packed, states[LAST] if hidden else logits


def forward_states(
    model: Any, rows: Sequence[TokenRow], layers: Sequence[int], *, packing: bool = True
) -> tuple[Packed, torch.Tensor, States]:
    """As `forward`, with the hidden states of `layers` beside the logits.

    layers: decoder blocks from 0 (what each gives), or LAST (what enters the output head, behind the final norm).

    Returns: the packing, (N, V) logits, {layer: (N, D)}, all at the scored positions.
    """
    soft = getattr(inner(model), SOFT_PROMPT, None)
    prompts = [len(soft) if soft is not None and r.owner == r.source == "task" else 0 for r in rows]
    device = next(model.parameters()).device
    packed = pack(rows, device, prompts)
    way = _way(model, [len(r.ids) + n for r, n in zip(rows, prompts, strict=True)], packing)
    return packed, *way(model, packed, prompts, soft, layers)


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


def _packed(model: Any, p: Packed, prompts: list[int], soft: Any, layers: Sequence[int]) -> Outcome:
    inputs: dict[str, Any] = {"input_ids": p.ids}
    if any(prompts):
        inputs = {"inputs_embeds": _embed(model, p, prompts, soft)[None]}
    with _switched(model, ATTENTION), _capture(model, layers) as seen:
        out = model(
            **inputs,
            position_ids=p.positions,
            packed_layout=p.layout,
            logits_to_keep=p.where,
            use_cache=False,
        )
    return out.logits[0], {n: s[0] if n == LAST else s[0][p.where] for n, s in seen.items()}


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


def _padded(model: Any, p: Packed, prompts: list[int], soft: Any, layers: Sequence[int]) -> Outcome:
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
    with _capture(model, layers) as seen:
        out = model(**inputs, use_cache=False)
    return out.logits[where], {n: s[where] for n, s in seen.items()}


def _one_by_one(model: Any, p: Packed, prompts: list[int], soft: Any, layers: Sequence[int]) -> Outcome:
    device = p.ids.device
    each = [_padded(model, pack([r], device, [n]), [n], soft, layers) for r, n in zip(p.rows, prompts, strict=True)]
    states = {n: torch.cat([own[n] for _, own in each]) for n in layers}
    return torch.cat([logits for logits, _ in each]), states


@contextmanager
def _capture(model: Any, layers: Sequence[int]) -> Iterator[States]:
    """Record what the blocks give and what enters the output head (that at the kept positions only)."""
    seen: States = {}
    handles = []
    for layer in layers:
        if layer == LAST:
            head = inner(model).get_output_embeddings()
            handles.append(head.register_forward_pre_hook(lambda _m, args: seen.__setitem__(LAST, args[0])))
        else:
            handles.append(blocks(model)[layer].register_forward_hook(partial(_note, seen, layer)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: States, layer: int, _module: Any, _args: Any, out: Any) -> None:
    seen[layer] = out[0] if isinstance(out, tuple) else out


def blocks(model: Any) -> torch.nn.ModuleList:
    """The decoder blocks: the longest list of modules of the model."""
    lists = [m for m in inner(model).modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        what = f"{type(inner(model)).__name__} has no list of blocks, so the states of a layer cannot be seen."
        raise ModelError(what, "Leave out of the plan what looks at layers.")
    return max(lists, key=len)
