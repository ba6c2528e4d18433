"""A running average of what trains, in the state of its method: what the averaging methods share."""

from collections.abc import Mapping

import torch

from holdfast.method import State

AVERAGE = "average/"  # begins the key of a parameter's average


def average_of(name: str, like: torch.Tensor, state: State) -> torch.Tensor | None:
    """The average of one parameter, on the device of `like`, or None before the first step."""
    kept = state.get(AVERAGE + name)
    return None if kept is None else kept.to(like.device)


def moved(average: torch.Tensor | None, param: torch.Tensor, rate: float) -> torch.Tensor:
    """The average after a step: `rate` of the way to the parameter; a new one begins as the parameter."""
    p = param.detach().float()
    return p.clone() if average is None else torch.lerp(average, p, rate)


def keyed(averages: Mapping[str, torch.Tensor]) -> State:
    return {AVERAGE + name: value for name, value in averages.items()}
