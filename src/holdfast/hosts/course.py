"""The course of the learning rate: transformers' own schedules by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import get_scheduler

from holdfast.errors import RecipeError

BARE = ("constant", "constant_with_warmup")  # transformers drops what these are given


def course(optimizer: torch.optim.Optimizer, steps: int, settings: Any) -> Any:
    """The schedule of `steps` steps that `settings` (`hosts.plain.Training`) names; a warm-up below 1 is a share."""
    warm = settings.warmup_steps if settings.warmup_steps >= 1 else math.ceil(steps * settings.warmup_steps)
    kind, more = settings.lr_scheduler_type, dict(settings.lr_scheduler_kwargs)
    return get_scheduler(kind, optimizer, int(warm), steps, more)


def check_course(settings: Any) -> None:
    """Raise RecipeError for settings that make no schedule; it is made and asked, on no model."""
    kind, given = settings.lr_scheduler_type, settings.lr_scheduler_kwargs
    if kind in BARE and given:
        what = f"training.lr_scheduler_kwargs has {', '.join(given)}, but the schedule {kind} takes no settings."
        raise RecipeError(what, "Remove training.lr_scheduler_kwargs, or choose another lr_scheduler_type.")
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
        factors = course(optimizer, settings.num_steps, settings).lr_lambdas[0]
        bad = [s for s in range(settings.num_steps) if not 0 <= factors(s) < math.inf]
    except (TypeError, ValueError, ZeroDivisionError) as e:
        what = f"training.lr_scheduler_kwargs {given} does not fit the schedule {kind}: {' '.join(str(e).split())}."
        raise RecipeError(what, "See get_scheduler in the documentation of transformers.") from e
    if bad:
        what = f"The schedule {kind} with {given} gives the rate {factors(bad[0]):g} times the peak at step {bad[0]}."
        raise RecipeError(what, "Change training.lr_scheduler_kwargs or training.warmup_steps.")
