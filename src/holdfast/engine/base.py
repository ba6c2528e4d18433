"""The model as the base it still is, and what it makes of rows, asked before anything trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.engine.processes import gather, shares, world
from holdfast.engine.replaced import switched_off


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """No dropout (a teacher that rolls dice is no teacher), and an adapter or replaced modules switched off."""
    was_training = model.training
    model.eval()
    try:
        with adapters_off(model), switched_off(model):
            yield
    finally:
        model.train(was_training)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The base inside of a model, whether PEFT wraps it or has put its layers into it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    trains = [(p, p.requires_grad) for p in model.parameters()]  # switching on again makes the adapter trainable
    for m in layers:
        m.enable_adapters(False)
    try:
        yield
    finally:
        for m in layers:
            m.enable_adapters(True)
        for p, wanted in trains:
            p.requires_grad_(wanted)


def has_adapter(model: Any) -> bool:
    """Whether an adapter can be switched off."""
    return hasattr(getattr(model, "module", model), "disable_adapter")


@torch.no_grad()
def token_logp(model: Any, rows: Sequence[TokenRow], batch_tokens: int = 1024) -> list[np.ndarray]:
    """For each row (n,) fp32 log-probabilities of its n targets, without any soft prompt.

    Several processes share the forwards, which are the same ones for any number of them: the numbers decide what is
    trained on, so they must be equal.
    """
    rank, num = world(model)
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    whole = [[longest_first[i] for i in at] for at in _places([rows[i] for i in longest_first], batch_tokens)]
    sizes = [sum(len(rows[i].ids) for i in at) for at in whole]
    found: dict[str, list[float]] = {}
    for n in shares(range(len(whole)), sizes, num)[rank]:
        packed, logits = forward(model, [replace(rows[i], source="asked") for i in whole[n]])
        chosen = logits.float().log_softmax(-1).gather(1, packed.target[:, None])[:, 0]
        found |= {str(i): part.tolist() for i, part in zip(whole[n], packed.by_row(chosen), strict=True)}
    if num > 1:
        found = {i: values for own in gather(found) for i, values in own.items()}
    return [np.asarray(found[str(i)], dtype=np.float32) for i in range(len(rows))]


def batches(rows: Sequence[TokenRow], most: int) -> Iterator[tuple[int, list[TokenRow]]]:
    """(rows done with this batch, batch) of at most so many tokens each."""
    for at in _places(rows, most):
        yield at.stop, list(rows[at.start : at.stop])


def _places(rows: Sequence[TokenRow], most: int) -> Iterator[range]:
    start, tokens = 0, 0
    for n, row in enumerate(rows):
        if n > start and tokens + len(row.ids) > most:
            yield range(start, n)
            start, tokens = n, 0
        tokens += len(row.ids)
    yield range(start, len(rows))
