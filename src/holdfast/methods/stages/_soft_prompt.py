"""What methods that train a soft prompt share: where it starts."""

import random

import torch

from holdfast.engine.ways import inner
from holdfast.services import Context


def sampled(ctx: Context, count: int, seed: str) -> torch.Tensor:
    """(count, D) fp32 embeddings of random ordinary tokens, as PEFT's "SAMPLE_VOCAB"."""
    table = inner(ctx.model).get_input_embeddings().weight
    special = set(getattr(ctx.tokenizer, "all_special_ids", ()))
    ids = random.Random(seed).sample([i for i in range(table.shape[0]) if i not in special], count)
    return table[ids].detach().float().clone()
