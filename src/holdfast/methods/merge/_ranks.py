"""Which magnitude a share of all numbers reaches, found in one pass without keeping them.

A magnitude falls into one of 2^20 bins by the leading bits of its float32 pattern, so a bin is 2^-12 of its values
wide, and whatever lies in the bin of the threshold counts as reaching it.
"""

import torch

DROPPED_BITS = 11  # of the 23 of the mantissa
BINS = 1 << (31 - DROPPED_BITS)


def counted(x: torch.Tensor) -> torch.Tensor:
    """(BINS,) how many magnitudes of a tensor, in fp32, fall into each bin; counts of several tensors add."""
    bits = x.abs().contiguous().view(torch.int32) >> DROPPED_BITS
    return bits.flatten().bincount(minlength=BINS)


def threshold(counts: torch.Tensor, share: float) -> float:
    """The magnitude that the largest `share` of what was counted reaches, at least one number."""
    wanted = max(1, int(share * int(counts.sum())))
    bins_above = int((counts.flip(0).cumsum(0) < wanted).sum())
    return _edge(BINS - 1 - bins_above)


def within(counts: torch.Tensor, share: float) -> float:
    """The magnitude that at most `share` of what was counted reaches: bins from the largest on, while they fit whole.

    Zeros never reach it; where not even the largest fit, nothing does.
    """
    fits = int((counts.flip(0).cumsum(0) <= share * int(counts.sum())).sum())
    return _edge(min(max(1, BINS - fits), BINS - 1))


def _edge(number: int) -> float:
    """The lowest magnitude of a bin."""
    return torch.tensor(number << DROPPED_BITS, dtype=torch.int32).view(torch.float32).item()
