"""Do two models compute the same? Their logits on two short rows, and how far rounding may move them.

A wrong function (a head that moved, an adapter left out) moves the logits of nearly every position by a good part of
their spread. Rounding moves them by a fixed small share of it, which depends on the dtype alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.engine.ways import inputs_behind

# Limits of `distance` (ours). SAME: the same weights in the same place, where at most sums go in another order.
# ROUNDED: W + s B A rounded to the dtype once per weight, computed in fp32; SmolLM2-135M under adapters from weak to
# very strong gave at most 0.025, 0.003 and 0.00001. ROUGH: computed in the dtype itself, or on another device;
# there 0.13 and 0.013 were seen. A head moved by an adapter that was meant for the embeddings alone gives 0.4 to 230.
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.002}
ROUNDED = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.01}
ROUGH = {torch.float32: 1e-3, torch.bfloat16: 0.4, torch.float16: 0.05}
EXACT_BYTES = 4_000_000_000  # weights up to here are computed with in fp32, which takes as much again for a moment
MOST_IDS = 24  # trained tokens that a row shows


def short_rows(model: Any, ids: Iterable[int] = ()) -> list[torch.Tensor]:
    """Two rows of token ids of unequal length: spread over the vocabulary, and `ids` (or the vocabulary's upper part).

    Ids that the configuration names (begin, end, image, ...) are left out of what is spread: some models treat them
    in ways of their own.
    """
    size = model.get_input_embeddings().weight.shape[0]
    named = {v for v in _numbers(model.config) if isinstance(v, int)}
    spread = [i for i in torch.linspace(0.05 * size, 0.9 * size, 9).long().tolist() if i not in named]
    more = [i for i in dict.fromkeys(ids) if 0 <= i < size][:MOST_IDS] or [i for i in spread[::-2] if i not in named]
    return [torch.tensor(spread or [0]), torch.tensor([*more, *spread[:2]])]


def _numbers(config: Any) -> Iterable[Any]:
    """The special ids of a configuration and of its text part."""
    for part in (config, getattr(config, "text_config", None)):
        yield from (v for k, v in vars(part).items() if k.endswith(("_token_id", "_token_index"))) if part else ()


@torch.no_grad()
def logits_of(model: Any, rows: Iterable[torch.Tensor], soft_prompt: torch.Tensor | None = None) -> list[torch.Tensor]:
    """(T, V) logits of each row in fp32 on the CPU, one row at a time, perhaps behind a prefix; with a (p, D) soft
    prompt (p + T, V)."""
    device = next(model.parameters()).device
    out = []
    for row in rows:
        inputs = inputs_behind(model, row[None].to(device), soft_prompt)
        out.append(model(**inputs, use_cache=False).logits[0].float().cpu())
    return out


@contextmanager
def in_float32(model: Any) -> Iterator[bool]:
    """Compute in fp32 with the weights as they are, where they are halves and not too many; yields whether it does."""
    halves = (torch.bfloat16, torch.float16)
    held = [p for p in (*model.parameters(), *model.buffers()) if p.dtype in halves]
    fits = sum(p.numel() * p.element_size() for p in held) <= EXACT_BYTES
    kept = [(p, p.dtype) for p in held] if fits and not getattr(model, "is_quantized", False) else []
    try:
        for p, _ in kept:
            p.data = p.data.float()
        yield bool(kept) or not held
    finally:
        for p, dtype in kept:  # nothing is lost: each number came from this dtype
            p.data = p.data.to(dtype)


def distance(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """How far two lists of logits lie apart, as a share of the spread over the vocabulary; NaN if not finite.

    Of each row the middle position counts: in a mixture of experts rounding may send single tokens another way.
    """
    return max((_apart(a, b) for a, b in zip(one, other, strict=True)), key=lambda x: (x != x, x))


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    known = (a.abs() < 1e4).all(0) & (b.abs() < 1e4).all(0) | a.isnan().any(0) | b.isnan().any(0)
    a, b = a[:, known], b[:, known]  # some models write the most negative number over words they never say
    spread = a.std(dim=1, correction=0).clamp_min(1e-6)
    return float(((a - b).square().mean(1).sqrt() / spread).median())
