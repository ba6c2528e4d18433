"""The scale of the loss: by which count of the whole optimizer step a term of a method is divided (`method.Term`).

The counts are of all micro-batches and processes of the step and known before the first of them runs, so the sum of
the parts is the same however the step is split.
"""

from __future__ import annotations

import torch

from holdfast.engine.counts import Counts, count_of, sources_of
from holdfast.engine.pack import Packed
from holdfast.method import Term


def divided(term: Term, packed: Packed, counts: Counts) -> torch.Tensor:
    """This micro-batch's part of a term that runs over an owner's positions or rows, a scalar."""
    assert term.owner is not None and term.per in ("position", "row", "source"), term.per
    if term.per != "source":
        return term.value.sum() / max(1, count_of(counts, term.owner, per=term.per))
    sources = sources_of(counts, term.owner)
    share = {s: 1 / (len(sources) * count_of(counts, term.owner, s)) for s in sources}
    own = [share[packed.rows[i].source] for i in packed.row if packed.rows[i].owner == term.owner]
    return (term.value * torch.as_tensor(own, dtype=term.value.dtype, device=term.value.device)).sum()
