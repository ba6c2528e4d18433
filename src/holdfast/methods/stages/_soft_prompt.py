"""What methods that train a soft prompt share: its numbers, its start, its stage, and the rows it is not read with."""

import random
from collections.abc import Mapping
from typing import Any

import torch

from holdfast.engine.ways import SOFT_PROMPT, inner
from holdfast.errors import PlanError
from holdfast.method import Stage
from holdfast.services import Context

ROWS_WITHOUT: dict[str, str] = dict.fromkeys(
    ("DART", "GOTD", "InContextMix", "ManyICL", "NonInstructional", "Replay"),
    "its rows are read without the prompt, and nothing but the prompt trains.",
)


def check_numbers(method: Any) -> None:
    """Raise PlanError for a prompt of no tokens, or a rate that is not positive."""
    if method.num_virtual_tokens < 1:
        raise PlanError(f"{method.name}.num_virtual_tokens is {method.num_virtual_tokens}.", "Use at least 1.")
    if method.learning_rate is not None and method.learning_rate <= 0:
        raise PlanError(f"{method.name}.learning_rate is {method.learning_rate}.", "Use more than 0.")


def alone(learning_rate: float | None) -> tuple[Stage, ...]:
    """The stage of a run in which nothing but the prompt trains, on the task."""
    return (Stage("prompt", 1.0, "prompt", learning_rate, keep_best=True, sources=("task",)),)


def trained(model: Any) -> Mapping[str, torch.Tensor]:
    """What the decode site gives: the prompt that hangs on the model."""
    return {"soft_prompt": getattr(inner(model), SOFT_PROMPT).detach()}


def ordinary(ctx: Context, count: int, seed: str) -> list[int]:
    """Ids of `count` random tokens without a special meaning, as PEFT's "SAMPLE_VOCAB"."""
    table = inner(ctx.model).get_input_embeddings().weight
    special = set(getattr(ctx.tokenizer, "all_special_ids", ()))
    return random.Random(seed).sample([i for i in range(table.shape[0]) if i not in special], count)


def sampled(ctx: Context, count: int, seed: str) -> torch.Tensor:
    """(count, D) fp32 embeddings of random ordinary tokens."""
    table = inner(ctx.model).get_input_embeddings().weight
    return table[ordinary(ctx, count, seed)].detach().float().clone()
