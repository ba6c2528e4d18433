"""A running average of what trains, in the state of its method: what the averaging methods share."""

from collections.abc import Callable, Mapping

import torch

from holdfast.method import State

Move = Callable[[torch.Tensor | None, torch.Tensor, float], torch.Tensor]  # `moved` or `step_to`
AVERAGE = "average/"  # begins the key of a parameter's average


def average_of(name: str, like: torch.Tensor, state: State) -> torch.Tensor | None:
    """The average of one parameter, on the device of `like`, or None before the first step."""
    kept = state.get(AVERAGE + name)
    return None if kept is None else kept.to(like.device)


def moved(average: torch.Tensor | None, param: torch.Tensor, rate: float) -> torch.Tensor:
    """The average after a step: `rate` of the way to the parameter; a new one begins as the parameter."""
    return step_to(None if average is None else average.clone(), param, rate)


def step_to(average: torch.Tensor | None, param: torch.Tensor, rate: float) -> torch.Tensor:
    """`moved`, in the memory of `average`."""
    p = param.detach().float()
    return p.clone() if average is None else average.lerp_(p, rate)


def keyed(averages: Mapping[str, torch.Tensor]) -> State:
    return {AVERAGE + name: value for name, value in averages.items()}
