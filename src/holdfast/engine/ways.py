"""The ways of a forward, each a function of (model, packed rows, prompt lengths, soft prompt, hidden): no choice here.

`engine.trial` tries them, `engine.forward` takes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from holdfast.engine.pack import ATTENTION, Packed, pack

SOFT_PROMPT = "holdfast_prompt"  # name of the (p, D) parameter ProMoT hangs on the model


def inner(model: Any) -> Any:
    """The transformers model inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_packed(model: Any, p: Packed, prompts: list[int], soft: Any, hidden: bool) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": p.ids}
    if any(prompts):
        inputs = {"inputs_embeds": _embed(model, p, prompts, soft)[None]}
    with switched(model, ATTENTION), _capture(model, hidden) as seen:
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


def run_padded(model: Any, p: Packed, prompts: list[int], soft: Any, hidden: bool) -> torch.Tensor:
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


def run_one_by_one(model: Any, p: Packed, prompts: list[int], soft: Any, hidden: bool) -> torch.Tensor:
    device = p.ids.device
    each = zip(p.rows, prompts, strict=True)
    return torch.cat([run_padded(model, pack([row], device, [n]), [n], soft, hidden) for row, n in each])


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


@contextmanager
def switched(model: Any, name: str) -> Iterator[None]:
    config = inner(model).config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
