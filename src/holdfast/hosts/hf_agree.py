"""Before the first step: what the trainer makes of two rows, and what the plan makes of them, must be the same.

Whatever a collator, a model or a subclass does that the plan's forward does not know (an attention of its own, types
or positions of tokens, padding that counts, another loss) shows here, before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.hosts.hf_batches import as_array, placed_rows, rows_of
from holdfast.hosts.hf_setup import quantised

MOST_LOGITS = 1 << 28  # numbers: SFTTrainer never builds the logits of whole rows, so only a GB of them is asked for
# how far two right answers may be apart: the loss in nats (or as a share of it above 1), logits on average as a share
# of their spread; fp32 on a CPU, elsewhere (where fp32 may be TF32), and in fewer bits
NEAR_CPU, NEAR_GPU, NEAR_HALF = 1e-3, 1e-2, 0.1


@dataclass(frozen=True)
class Answer:
    """What somebody makes of a batch: its mean loss, and (N, V) logits at the scored positions if they were built."""

    loss: float
    logits: torch.Tensor | None


def some_of(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shortest and the longest row of the first batch that has a target; a flat batch is left whole."""
    batch = next((b for b in batches if any(r.num_scored for r in rows_of(b))), batches[0])
    size = len(batch["input_ids"])
    order = np.argsort(as_array(batch.get("attention_mask", batch["input_ids"])).astype(bool).sum(axis=1))
    at = torch.as_tensor(np.unique(order[[0, -1]]))
    cut = {k: v[at] for k, v in batch.items() if isinstance(v, torch.Tensor) and v.shape[:1] == (size,) and size > 1}
    return {**batch, **cut}


def asks_logits(model: Any, batch: Mapping[str, Any]) -> bool:
    """Whether the logits of all positions are few enough to be built."""
    return batch["input_ids"].numel() * getattr(model.config.get_text_config(), "vocab_size", 0) <= MOST_LOGITS


def trainers_answer(loss: torch.Tensor, outputs: Any, batch: Mapping[str, Any]) -> Answer:
    """From what compute_loss returned for `batch`."""
    logits = getattr(outputs, "logits", None)
    if logits is None:  # a forward of the user's own
        return Answer(loss.item(), None)
    at = np.concatenate([places[np.flatnonzero(row.scored) - 1] for row, places in placed_rows(batch)])
    return Answer(loss.item(), logits.flatten(0, 1)[torch.as_tensor(at, device=logits.device)])


def plans_answer(model: Any, batch: Mapping[str, Any]) -> Answer:
    """The batch as the plan reads it, without any method; the loss is nan where nothing is scored."""
    rows = [replace(r, source="check") for r in rows_of(batch)]  # no soft prompt before them
    packed, logits = forward(model, rows)
    return Answer(torch.nn.functional.cross_entropy(logits.float(), packed.target).item(), logits)


def refuse_other(host: str, own: Answer, plans: Answer, model: Any, options: Any, batch: Mapping[str, Any]) -> None:
    """Raise PlanError unless the two agree; a loss that is not finite is left to the training itself."""
    most = near(model, options)
    if not math.isfinite(own.loss) or math.isnan(plans.loss):
        return
    words = f"a loss of {own.loss:.5g} where the plan has {plans.loss:.5g}"
    if abs(own.loss - plans.loss) <= most * max(1.0, abs(own.loss)):
        away = _apart(own.logits, plans.logits)
        if away <= most:
            return
        words = f"logits that are {away:.2g} of their spread away from the plan's"
    kind = getattr(model.config, "_attn_implementation", None)
    raise PlanError(
        f"{host} would begin with {words} for the same rows, so something that it or the model reads is unknown to "
        f"the plan (the batch holds {', '.join(sorted(batch))}; the model's attention is {kind!r}).",
        "Use right-padded batches of input_ids, attention_mask and labels, and the model's own attention and loss.",
    )


def _apart(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """Mean distance of two sets of logits as a share of their spread over the vocabulary."""
    if a is None or b is None or not len(b):
        return 0.0
    spread = b.float().std(-1).mean().clamp(min=1e-6)
    return ((a.float() - b.float()).abs().mean() / spread).item()


def near(model: Any, options: Any) -> float:
    """How far two right answers may be apart."""
    weights = list(model.parameters())
    half = options.bf16 or options.fp16 or options.mixed_precision != "no" or quantised(model)
    if half or any(p.dtype != torch.float32 for p in weights):
        return NEAR_HALF
    return NEAR_CPU if weights[0].device.type == "cpu" else NEAR_GPU
