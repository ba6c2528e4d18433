"""The ways of a forward, each a function of (model, packed rows, prompt lengths, soft prompt, layers): no choice here.

`engine.trial` tries them, `engine.forward` takes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from holdfast.engine.attention import ATTENTION
from holdfast.engine.layout import upload
from holdfast.engine.pack import Packed, TokenRow, pack
from holdfast.engine.prefix import behind, cache_name, cache_of, is_prefix
from holdfast.engine.replaced import Handed, collecting
from holdfast.errors import ModelError

LAST = -1  # the layer whose states enter the output head
States = dict[int, torch.Tensor]  # layer -> (N, D)
# (N, V) logits, the states of the layers asked for, and what replaced modules handed out, (T, ...) in packed order
Outcome = tuple[torch.Tensor, States, Handed]
ASKED = "_holdfast_attention"  # attribute of the model: the attention that its user named
SOFT_PROMPT = "holdfast_prompt"  # name of the parameter that stages hang on the model: (p, D), or a prefix


def inner(model: Any) -> Any:
    """The transformers model inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_packed(model: Any, p: Packed, prompts: list[int], soft: Any, layers: Sequence[int]) -> Outcome:
    inputs: dict[str, Any] = {"input_ids": p.ids}
    if any(prompts) or blends(p):
        inputs = {"inputs_embeds": _embed(model, p, prompts, soft)[None]}
    p.layout.asked = asked_for(model)
    with switched(model, ATTENTION), _capture(model, layers) as seen, collecting() as handed:
        out = model(
            **inputs,
            position_ids=p.positions,
            packed_layout=p.layout,
            logits_to_keep=p.where,
            use_cache=False,
        )
    states = {n: s[0] if n == LAST else s[0][p.where] for n, s in seen.items()}
    return out.logits[0], states, {k: [_by_token(v, p.ids.shape)[0] for v in vs] for k, vs in handed.items()}


def spans(prompts: Sequence[int], soft: Any) -> list[int]:
    """How many places of its own each row's prompt takes: none of a prefix, which is no part of the row."""
    return [0] * len(prompts) if is_prefix(soft) else list(prompts)


def inputs_behind(model: Any, ids: torch.Tensor, soft: torch.Tensor | None) -> dict[str, Any]:
    """What a model is given to read ids (B, T) behind a (p, D) soft prompt or a prefix, if there is one."""
    if soft is None:
        return {"input_ids": ids}
    table = inner(model).get_input_embeddings()
    if is_prefix(soft):
        cache = cache_of(soft.to(ids.device), len(ids), table.weight.dtype)
        return {"input_ids": ids, cache_name(inner(model)): cache}
    embedded = table(ids)
    return {"inputs_embeds": torch.cat([soft.to(embedded).expand(len(ids), -1, -1), embedded], dim=1)}


def _by_token(value: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """(B, L, ...) what a module handed out; some are given their tokens end to end, (B L, ...)."""
    return value if value.shape[:2] == grid else value.unflatten(0, tuple(grid))


def _embed(model: Any, p: Packed, prompts: list[int], soft: torch.Tensor) -> torch.Tensor:
    """(T, D) embeddings with the soft prompt written before each row that has one, and blended rows mixed."""
    parts, at = [], 0
    table = inner(model).get_input_embeddings()
    embeddings = table(p.ids[0])
    if blends(p):
        other, share = _blended(p, prompts)
        embeddings = embeddings + share.to(embeddings.dtype) * (table(other) - embeddings)
    for row, n in zip(p.rows, prompts, strict=True):
        end = at + n + len(row.ids)
        parts += [soft.to(embeddings.dtype)] if n else []
        parts.append(embeddings[at + n : end])
        at = end
    return torch.cat(parts)


def blends(p: Packed) -> bool:
    """Whether some row is read as a mixture of two."""
    return any(r.blend is not None for r in p.rows)


def _blended(p: Packed, prompts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) the ids that are mixed in, and (T, 1) by which share."""
    ids = [a for r, n in zip(p.rows, prompts, strict=True) for a in (np.zeros(n, dtype=np.int64), _other(r))]
    shares = [
        np.full(n + len(r.ids), 0.0 if r.blend is None else r.blend_share, dtype=np.float32)
        for r, n in zip(p.rows, prompts, strict=True)
    ]
    return upload(np.concatenate(ids), p.ids.device), upload(np.concatenate(shares), p.ids.device)[:, None]


def _other(row: TokenRow) -> np.ndarray:
    return row.ids if row.blend is None else row.blend


def run_padded(model: Any, p: Packed, prompts: list[int], soft: Any, layers: Sequence[int]) -> Outcome:
    own = spans(prompts, soft)
    lengths = [len(r.ids) + n for r, n in zip(p.rows, own, strict=True)]
    width, starts = max(lengths), np.concatenate([[0], np.cumsum(lengths)])
    real = np.arange(width) < np.asarray(lengths)[:, None]
    cells = np.where(real, starts[:-1, None] + np.arange(width), 0)
    at, mask, shift = (upload(a, p.ids.device) for a in (cells, real.astype(np.int64), starts[p.row]))
    grid = p.ids[0][at] * mask
    inputs: dict[str, Any] = {"input_ids": grid}
    if any(own) or blends(p):
        flat = _embed(model, p, own, soft)
        inputs = {"inputs_embeds": flat[at] * mask[..., None]}
    where = upload(p.row, p.where.device), p.where - shift
    if is_prefix(soft) and any(prompts):
        inputs |= behind(inner(model), soft, prompts, mask)
    elif len(p.rows) > 1:
        inputs["attention_mask"] = mask
    with _capture(model, layers) as seen, collecting() as handed:
        out = model(**inputs, use_cache=False)
    real = mask.bool()
    kept = {k: [_by_token(v, grid.shape)[real] for v in vs] for k, vs in handed.items()}
    return out.logits[where], {n: s[where] for n, s in seen.items()}, kept


def run_one_by_one(model: Any, p: Packed, prompts: list[int], soft: Any, layers: Sequence[int]) -> Outcome:
    device = p.ids.device
    each = [
        run_padded(model, pack([r], device, spans([n], soft)), [n], soft, layers)
        for r, n in zip(p.rows, prompts, strict=True)
    ]
    states = {n: torch.cat([own[n] for _, own, _ in each]) for n in layers}
    handed = {k: [torch.cat(vs) for vs in zip(*(own[k] for *_, own in each), strict=True)] for k in each[0][2]}
    return torch.cat([logits for logits, *_ in each]), states, handed


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


def ask(model: Any, name: str) -> None:
    """Note the attention that a user asked for by name; it is in no config, which `switched` changes."""
    inner(model).__dict__[ASKED] = name


def asked_for(model: Any) -> str | None:
    return inner(model).__dict__.get(ASKED)


@contextmanager
def switched(model: Any, name: str) -> Iterator[None]:
    config = inner(model).config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
