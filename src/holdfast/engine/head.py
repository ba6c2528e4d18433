"""The output head apart from the model: states first, logits later and for a part of the positions at a time.

Whole logits of a step are positions x vocabulary: at 16,000 positions and 128,000 tokens 8 GiB in fp32, several times
over in a backward. The states that enter the head are all that has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from holdfast.engine.forward import forward, forward_states
from holdfast.engine.pack import Packed, TokenRow, token_row
from holdfast.engine.replaced import Handed
from holdfast.engine.trial import kept
from holdfast.engine.ways import LAST, States, inner

PIECE = 1 << 26  # logits at a time: 256 MiB in fp32


def head_of(model: Any) -> Any:
    return inner(model).get_output_embeddings()


def head_is_plain(model: Any) -> bool:
    """True when logits are just head(last hidden): no soft-capping or scaling afterwards (checked, not assumed)."""
    return kept(model, "plain head", _is_plain)


@torch.no_grad()
def _is_plain(model: Any) -> bool:
    seen: list[torch.Tensor] = []
    handle = head_of(model).register_forward_hook(lambda _m, _a, out: seen.append(out))
    was_training = model.training
    model.eval()
    try:  # through the engine: inside of a step the model's attention is switched to that of packed rows
        _, logits = forward(model, [token_row(range(4), 1)])
    finally:
        handle.remove()
        model.train(was_training)
    return bool(torch.equal(logits.float(), seen[-1][0, : len(logits)].float()))  # a first forward tries the model too


def comes_apart(model: Any) -> bool:
    """Whether the head can be left out of a forward: it is plain, and nobody else has put himself before it."""
    return head_is_plain(model) and "forward" not in vars(head_of(model))


def forward_bare(
    model: Any, rows: Sequence[TokenRow], layers: Sequence[int], *, packing: bool = True
) -> tuple[Packed, States, Handed]:
    """As `forward_states`, without logits; the states that enter the head (LAST) are always there.

    Only for a model that `comes_apart`.
    """
    with left_out(head_of(model)):
        packed, _, states, handed = forward_states(model, rows, tuple({*layers, LAST}), packing=packing)
    return packed, states, handed


@contextmanager
def left_out(head: Any) -> Iterator[None]:
    head.forward = lambda states: states
    try:
        yield
    finally:
        del head.forward


# ---- pieces of a packing


def pieces(packed: Packed, most: int, splits: bool) -> list[tuple[slice, Packed]]:
    """The positions of a packing in runs of about `most`, each as a packing of its own rows.

    Rows stay whole but where `splits`: then one of more positions is cut, and stands in each piece with the positions
    of that piece scored.
    """
    out, counts = [], np.bincount(packed.row, minlength=len(packed.rows))
    ends = np.cumsum(counts)
    start = 0
    while start < len(packed.row):
        fits = ends[(ends > start) & (ends <= start + most)]
        row = int(packed.row[start])
        end = int(fits[-1]) if len(fits) else min(start + most, int(ends[row])) if splits else int(ends[row])
        out.append((slice(start, end), _piece(packed, start, end, ends - counts)))
        start = end
    return out


def _piece(packed: Packed, start: int, end: int, begins: np.ndarray) -> Packed:
    """The packing of the positions from `start` to `end`."""
    there = np.unique(packed.row[start:end])
    rows = [_part(packed.rows[n], start - int(begins[n]), end - int(begins[n])) for n in there]
    row = np.searchsorted(there, packed.row[start:end])
    return replace(packed, where=packed.where[start:end], target=packed.target[start:end], row=row, rows=rows)


def _part(row: TokenRow, start: int, end: int) -> TokenRow:
    """The row with its scored positions `start` to `end` (of those it has) scored."""
    at = np.flatnonzero(row.scored)
    if start <= 0 and end >= len(at):
        return row
    scored = np.zeros_like(row.scored)
    scored[at[max(0, start) : end]] = True
    return replace(row, scored=scored, whole=row)
