"""Before the first step: what the trainer makes of two rows, and what the plan makes of them, must be the same.

Whatever a collator, a model or a subclass does that the plan's forward does not know (an attention of its own, types
or positions of tokens, padding that counts, another loss) shows here, before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.hosts.hf_batches import as_array, placed_rows, rows_of
from holdfast.hosts.hf_setup import quantised

MOST_LOGITS = 1 << 28  # numbers: SFTTrainer never builds the logits of whole rows, so only a GB of them is asked for
# How far two right answers may be apart: losses in nats (above 1: as a share), logits as a share of their spread. In
# fp32 on a CPU logits agree to 3e-7, and a forgotten mask is 6e-4 or more away, even where weights are random. On
# other devices fp32 may be TF32. In bf16 autocast a 135M model is 0.05 away where it is farthest.
NEAR = {"cpu": (1e-3, 3e-4), "fp32": (1e-2, 1e-2), "half": (0.05, 0.2)}


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


def refuse_other(host: str, own: Answer, plans: Answer, model: Any, half: bool, batch: Mapping[str, Any]) -> None:
    """Raise PlanError unless the two agree; a loss that is not finite is left to the training itself.

    half: they were computed in few bits, although the weights may be fp32.
    """
    if not math.isfinite(own.loss) or math.isnan(plans.loss):
        return
    near_loss, near_logits = NEAR[_computed_in(model, half)]
    words = f"a loss of {own.loss:.5g} where the plan has {plans.loss:.5g}"
    if abs(own.loss - plans.loss) <= near_loss * max(1.0, abs(own.loss)):
        away = _apart(own.logits, plans.logits)
        if away <= near_logits:
            return
        words = f"logits that are {away:.2g} of their spread away from the plan's"
    kind = getattr(model.config, "_attn_implementation", None)
    raise PlanError(
        f"{host} would begin with {words} for the same rows, so something that it or the model reads is unknown to "
        f"the plan (the batch holds {', '.join(sorted(batch))}; the model's attention is {kind!r}).",
        "Use right-padded batches of input_ids, attention_mask and labels, and the model's own attention and loss.",
    )


def _apart(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """How far logits are apart where they are farthest, on average over the vocabulary, as a share of their spread."""
    if a is None or b is None or not len(b):
        return 0.0
    spread = b.float().std(-1).mean().clamp(min=1e-6)
    return ((a.float() - b.float()).abs().mean(-1).max() / spread).item()


def _computed_in(model: Any, half: bool) -> str:
    """A key of NEAR."""
    weights = list(model.parameters())
    if half or quantised(model) or any(p.dtype != torch.float32 for p in weights):
        return "half"
    return "cpu" if weights[0].device.type == "cpu" else "fp32"


def works_in_fp32(model: Any) -> bool:
    """False for attention that is made for fewer bits alone (flash kernels)."""
    return getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")


@contextmanager
def bare_forward(model: Any) -> Iterator[None]:
    """Without the autocast that accelerate puts around `model.forward`: fp32 tells small differences from rounding."""
    wrapped, bare = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if wrapped is None or bare is None:
        yield
        return
    model.forward = bare
    try:
        yield
    finally:
        model.forward = wrapped
