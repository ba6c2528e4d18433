"""Which magnitude a share of all numbers reaches, found in one pass without keeping them.

A magnitude falls into one of 2^20 bins by the leading bits of its float32 pattern, so a bin is 2^-12 of its values
wide, and whatever lies in the bin of the threshold counts as reaching it. `largest` looks into that bin and is exact.
"""

import torch

DROPPED_BITS = 11  # of the 23 of the mantissa
BINS = 1 << (31 - DROPPED_BITS)
ROW = 1 << 10


def counted(x: torch.Tensor) -> torch.Tensor:
    """(BINS,) how many magnitudes of a tensor, in fp32, fall into each bin; counts of several tensors add."""
    return (_patterns(x) >> DROPPED_BITS).bincount(minlength=BINS)


def largest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Bool, in the shape of `x` (fp32): its `count` entries of the largest magnitude; of equal ones the first.

    Those that a stable sort would put first, in a fraction of its time: only the bin at the edge is sorted.
    """
    if count >= x.numel():
        return torch.ones_like(x, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(x, dtype=torch.bool)
    bits = _patterns(x)
    bins = bits >> DROPPED_BITS
    whole, held = _fit(bins.bincount(minlength=BINS), count - 1)
    taken, edge = bins > BINS - 1 - whole, (bins == BINS - 1 - whole).nonzero().flatten()
    taken[edge[bits[edge].sort(descending=True, stable=True).indices[: count - held]]] = True
    return taken.view_as(x)


def threshold(counts: torch.Tensor, share: float) -> float:
    """The magnitude that the largest `share` of what was counted reaches, at least one number."""
    bins_above, _ = _fit(counts, max(1, int(share * int(counts.sum()))) - 1)
    return _edge(BINS - 1 - bins_above)


def within(counts: torch.Tensor, share: float) -> float:
    """The magnitude that at most `share` of what was counted reaches: bins from the largest on, while they fit whole.

    Zeros never reach it; where not even the largest fit, nothing does.
    """
    fits, _ = _fit(counts, share * int(counts.sum()))
    return _edge(min(max(1, BINS - fits), BINS - 1))


def _patterns(x: torch.Tensor) -> torch.Tensor:
    """(N,) the magnitudes of an fp32 tensor as integers, which are in the same order."""
    return x.abs().contiguous().view(torch.int32).flatten()


def _fit(counts: torch.Tensor, most: float) -> tuple[int, int]:
    """How many bins, from the largest on, hold at most `most` numbers together, and how many these hold.

    Sums of rows of bins come first, so that only one row is walked bin by bin.
    """
    rows = counts.view(-1, ROW).flip(0)
    sums = rows.sum(1).cumsum(0)
    full = int((sums <= most).sum())
    if full == len(rows):
        return BINS, int(sums[-1])
    before = int(sums[full - 1]) if full else 0
    own = rows[full].flip(0).cumsum(0)
    more = int((own <= most - before).sum())
    return full * ROW + more, before + (int(own[more - 1]) if more else 0)


def _edge(number: int) -> float:
    """The lowest magnitude of a bin."""
    return torch.tensor(number << DROPPED_BITS, dtype=torch.int32).view(torch.float32).item()
