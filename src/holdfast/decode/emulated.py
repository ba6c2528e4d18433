"""Emulated fine-tuning (EFT, proxy tuning): a large model talks as if it had been tuned like a small one.

    log p(y) = log softmax( log pi_L(y) + 1/beta * sum_i w_i (log pi_i(y) - log pi_0(y)) )
    pi_L   the large model, untouched       pi_i   a small tuned model       pi_0   the small model before tuning

Mitchell et al., ICLR 2024 (arXiv 2310.12962, An Emulator for Fine-Tuning Large Language Models using Small Language
Models); with beta 1 the same formula as proxy tuning (arXiv 2401.08565). The large model keeps all it knows, since no
weight of it changes. Swap the sizes and it is the paper's down-scaling: a small model with a large one's tuning.

With `top_p`, only tokens of the large model's nucleus are weighted and the others keep its log-probability before all
are normalised; the paper uses such a guard, its values (about 0.9 to 0.95) were not verified, and none is the default.
Temperature and the other settings of sampling act on the outcome. The paper's speculative form is transformers' own:
hand the small tuned model to `generate(assistant_model=...)` too; greedy text stays the same.

Cost: one forward of the large and one of each small model a token, with three sets of keys and values. All models need
the same tokenizer. Rows of a table beyond the smallest one (padding of vocabularies) cannot be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from holdfast import models
from holdfast.decode.beside import Beside
from holdfast.errors import HoldfastError, ModelError


class EmulatedTuning(LogitsProcessor):
    """For the large model: `large.generate(..., logits_processor=[EmulatedTuning(tuned, base)])`.

    Args:
        tuned: the small tuned model, or several; base: the small one before tuning.
        beta: above 0; 1 is plain emulation, a larger one stays nearer to the large model.
        weights: w, one for each tuned model; None: all 1.
        top_p: tokens of the large model's nucleus alone are weighted; None: all.
        attention_mask: (B, T) of the prompts, where they are padded on the left.

    Raises:
        HoldfastError: values that make no sense.
    """

    def __init__(
        self,
        tuned: Any,
        base: Any,
        *,
        beta: float = 1.0,
        weights: Sequence[float] | None = None,
        top_p: float | None = None,
        attention_mask: torch.Tensor | None = None,
    ):
        all_tuned = [tuned] if isinstance(tuned, torch.nn.Module) else list(tuned)
        self.weights = [1.0] * len(all_tuned) if weights is None else list(weights)
        self.beta, self.top_p = beta, top_p
        if not beta > 0:
            raise HoldfastError(f"EmulatedTuning's beta is {beta}.", "Use a number above 0.")
        if not all_tuned or len(self.weights) != len(all_tuned):
            what = f"EmulatedTuning has {len(all_tuned)} tuned models and {len(self.weights)} weights."
            raise HoldfastError(what, "Give a weight for each tuned model, and at least one.")
        if top_p is not None and not 0 < top_p <= 1:
            raise HoldfastError(f"EmulatedTuning's top_p is {top_p}.", "Use a share above 0, at most 1, or None.")
        self.tuned = [Beside(m, attention_mask) for m in all_tuned]
        self.base = Beside(base, attention_mask)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(B, V) log-probabilities in place of the large model's scores."""
        small = [m.logits(input_ids).to(scores.device) for m in (self.base, *self.tuned)]
        return emulated(scores, small[1:], small[0], 1 / self.beta, self.weights, self.top_p)  # pyright: ignore


def emulated(
    large: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    base: torch.Tensor,
    strength: float = 1.0,
    weights: Sequence[float] | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """(..., V) log-probabilities, fp32, of logits (..., V) of all models at the same positions (teacher forcing too).

    strength: 1 / beta.
    """
    size = min(x.shape[-1] for x in (large, base, *tuned))
    logp, before, *after = (x[..., :size].float().log_softmax(-1) for x in (large, base, *tuned))
    added = sum(w * (a - before) for w, a in zip(weights or [1.0] * len(tuned), after, strict=True))
    mixed = logp + strength * added
    if top_p is not None:
        mixed = torch.where(nucleus(logp, top_p), mixed, logp)
    mixed = mixed.log_softmax(-1)
    return torch.nn.functional.pad(mixed, (0, large.shape[-1] - size), value=-torch.inf)


def nucleus(logp: torch.Tensor, top_p: float) -> torch.Tensor:
    """(..., V) whether a token is among the likeliest that together reach `top_p`."""
    ordered, index = logp.exp().sort(-1, descending=True)
    inside = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(inside).scatter(-1, index, inside)


def load_emulated(tuned: str, base: str, tokenizer: Any, *, settings: Any = None, **how: Any) -> EmulatedTuning:
    """The processor from names or folders of the small models (adapters too).

    Args:
        tokenizer: the large model's, which must give the same words the same numbers.
        settings: of `EmulatedTuning`, as a dict.
        how: of `models.load`: dtype, device, trust_remote_code, attn_implementation.

    Raises:
        ModelError: another vocabulary, or a model that cannot be loaded.
    """
    loaded = []
    for name in (tuned, base):
        model, own = models.load(name, merge_adapter=True, **how)
        if own.get_vocab() != tokenizer.get_vocab():
            what = f"{name} has another vocabulary than the large model."
            raise ModelError(what, "Their logits are added token by token: use models of one family.")
        loaded.append(model)
    return EmulatedTuning(*loaded, **(settings or {}))
