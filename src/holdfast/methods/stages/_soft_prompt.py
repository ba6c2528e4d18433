"""What methods that train a soft prompt share: where it starts, and which rows it is not read with."""

import random

import torch

from holdfast.engine.ways import inner
from holdfast.services import Context

ROWS_WITHOUT: dict[str, str] = dict.fromkeys(
    ("DART", "GOTD", "InContextMix", "ManyICL", "NonInstructional", "Replay"),
    "its rows are read without the prompt, and nothing but the prompt trains.",
)


def ordinary(ctx: Context, count: int, seed: str) -> list[int]:
    """Ids of `count` random tokens without a special meaning, as PEFT's "SAMPLE_VOCAB"."""
    table = inner(ctx.model).get_input_embeddings().weight
    special = set(getattr(ctx.tokenizer, "all_special_ids", ()))
    return random.Random(seed).sample([i for i in range(table.shape[0]) if i not in special], count)


def sampled(ctx: Context, count: int, seed: str) -> torch.Tensor:
    """(count, D) fp32 embeddings of random ordinary tokens."""
    table = inner(ctx.model).get_input_embeddings().weight
    return table[ordinary(ctx, count, seed)].detach().float().clone()
