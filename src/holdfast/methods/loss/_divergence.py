"""Divergences between log-probabilities, per position. Both are 0, with zero gradient, when the two agree."""

import torch


def forward_kl(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """KL(base || tuned) over the vocabulary: (M, V), (M, V) -> (M,). Mass-covering; the teacher stands first."""
    return (base.exp() * (base - tuned)).sum(-1)


def reverse_kl(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """KL(tuned || base) over the vocabulary: (M, V), (M, V) -> (M,). Mode-seeking."""
    return (tuned.exp() * (tuned - base)).sum(-1)


KINDS = {"forward": forward_kl, "reverse": reverse_kl}
