"""Greedy answers to many prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from holdfast.measure.probe import Probe

BATCH = 32


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    batch_size: int = BATCH,
    progress: Callable[[float], None] | None = None,
) -> list[str]:
    """The model's greedy text after each probe's context, up to its `max_tokens` or the end-of-text token.

    Prompts are padded on the left and sorted by length. Greedy text depends on the last bits of the logits, so two
    batch sizes may give other words in bf16; the batches depend on the probes alone, so base and tuned get the same.
    """
    if not probes:
        return []
    device = next(model.parameters()).device
    encoded = [_ids(p.context, tokenizer) for p in probes]
    order = sorted(range(len(probes)), key=lambda n: (probes[n].max_tokens, len(encoded[n])))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = [""] * len(probes)
    was_training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            width = max(len(encoded[n]) for n in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros_like(ids)
            for i, n in enumerate(batch):
                ids[i, width - len(encoded[n]) :] = torch.tensor(encoded[n])
                mask[i, width - len(encoded[n]) :] = 1
            got = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(probes[n].max_tokens for n in batch),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                pad_token_id=pad,
            )
            for i, n in enumerate(batch):
                new = got[i, width : width + probes[n].max_tokens]
                out[n] = tokenizer.decode(new, skip_special_tokens=True).strip()
            if progress:
                progress((at + len(batch)) / len(order))
    finally:
        model.train(was_training)
    return out


def _ids(text: str, tokenizer: Any) -> list[int]:
    has_bos = bool(tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return tokenizer.encode(text, add_special_tokens=not has_bos)
