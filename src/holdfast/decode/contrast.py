"""Contrastive decoding of a tuned model against its base: text that tuning made likelier.

    score(v) = log p_tuned(v) - log p_base(v)   where p_tuned(v) >= alpha * max p_tuned,   -inf elsewhere

It is the generation of CGE (Isonuma and Titov, ICLR 2025, arXiv 2410.14765), with the plausible set of contrastive
decoding. The paper was read in its abstract and summaries; alpha 0.1 is ours. alpha 1 is the tuned model's greedy
text. Cost: a forward of both models a token. What comes out may be memorised training text: treat it as private.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LogitsProcessor

from holdfast.decode.beside import Beside
from holdfast.errors import HoldfastError


class Contrast(LogitsProcessor):
    """For the tuned model: `tuned.generate(..., logits_processor=[Contrast(base)])`.

    Args:
        base: the model before tuning, with the same tokenizer.
        alpha: how likely a token must be beside the likeliest one, above 0 and at most 1.
        attention_mask: (B, T) of the prompts, where they are padded on the left.
    """

    def __init__(self, base: Any, alpha: float = 0.1, attention_mask: torch.Tensor | None = None):
        if not 0 < alpha <= 1:
            raise HoldfastError(f"Contrast's alpha is {alpha}.", "Use a number above 0, at most 1.")
        self.base, self.alpha = Beside(base, attention_mask), alpha

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(B, V) the contrast in place of the tuned model's scores."""
        return contrasted(scores, self.base.logits(input_ids).to(scores.device), self.alpha)  # pyright: ignore


def contrasted(tuned: torch.Tensor, base: torch.Tensor, alpha: float) -> torch.Tensor:
    """(..., V) log p_tuned - log p_base of logits (..., V) in the plausible set, -inf outside; never empty."""
    size = min(tuned.shape[-1], base.shape[-1])
    after, before = (x[..., :size].float().log_softmax(-1) for x in (tuned, base))
    plausible = after >= after.amax(-1, keepdim=True) + math.log(alpha)
    score = torch.where(plausible, after - before, -torch.inf)
    return torch.nn.functional.pad(score, (0, tuned.shape[-1] - size), value=-torch.inf)
