"""What tuned models changed of their base, by role: what methods that add several of them work on."""

from collections.abc import Iterator, Mapping, Sequence

import torch


def by_place(models: Sequence[str]) -> dict[str, str]:
    """Roles of further models, for `Method.others`."""
    return {f"other {n}": name for n, name in enumerate(models)}


def changes(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(role, tuned - base) of the run's own model and of each further one, each made when it is asked for."""
    base = weights["base"]
    return ((role, w - base) for role, w in weights.items() if role != "base")
