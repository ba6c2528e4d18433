"""States of a frozen model as the rows of a closed-form head (`runs.ridge_head`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from holdfast.engine.forward import forward
from holdfast.engine.pack import token_row
from holdfast.errors import HoldfastError

POOLS = ("last", "mean")


@torch.no_grad()
def features(model: Any, texts: Sequence[Sequence[int]], pool: str = "last") -> torch.Tensor:
    """(N, D) fp64: what enters the output head at the last token of each text (token ids), or the mean over them.

    Each text runs alone, so the same text has the same states in any company.

    Raises:
        HoldfastError: another pool, an empty text.
    """
    if pool not in POOLS or not all(texts):
        raise HoldfastError(
            f"States were asked for by {pool!r} of {len(texts)} texts.", "last or mean, no empty text."
        )
    # a state is read where a token is predicted: one more token, which no state sees
    states = [forward(model, [token_row([*ids, ids[-1]], 1)], hidden=True)[1].double() for ids in texts]
    return torch.stack([s[-1] if pool == "last" else s.mean(0) for s in states]).cpu()


def expand(states: torch.Tensor, width: int, seed: int = 0) -> torch.Tensor:
    """(N, width) fp64 random ReLU features, relu(P A) with A normal by seed, of variance 1 / D."""
    size = states.shape[1]
    a = torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / size**0.5
    return (states.detach().cpu().double() @ a).relu()
