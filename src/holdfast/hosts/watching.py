"""Looks at a model while it trains: the best one's weights may be kept, and a run that gets no better may end.

What a look finds is the caller's. The training is the same to the last bit with and without looks, and a run that goes
on from a checkpoint has the looks before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.hosts.checkpoint import Checkpoint


@dataclass
class Watch:
    """When to look, and what follows.

    Attributes:
        every: steps between two looks; the first is before the first step. Where the best look's weights are kept,
            there is one after the last step too.
        look: (model, step) -> (rank, finding): a higher rank is better, None is out of the question; the finding is
            plain data for the log.
        keep_best: end with the weights of the best look (of equals the first).
        patience: looks in a row without a better one after which the run ends; None: it does not.
    """

    every: int
    look: Callable[[Any, int], tuple[float | None, dict[str, float]]]
    keep_best: bool = False
    patience: int | None = None

    def begin(self, session: Any, checkpoint: Checkpoint, log: Any) -> None:
        """Look at the model before the first step, unless the run goes on."""
        if not log.looks:
            self._look(session, checkpoint, log, 0)

    def after(self, step: int, of: int, session: Any, checkpoint: Checkpoint, log: Any) -> None:
        """Look if it is time to, after `step` of all steps; may set `log.ended`."""
        if step % self.every and not (self.keep_best and step == of):
            return
        start = time.perf_counter()
        self._look(session, checkpoint, log, step)
        log.seconds -= time.perf_counter() - start  # looking is no training
        since = len(log.looks) - 1 - _best(log.looks)
        if self.patience is not None and since >= self.patience:
            log.ended = f"{since} looks in a row were no better than that at step {log.looks[_best(log.looks)][0]}"

    def _look(self, session: Any, checkpoint: Checkpoint, log: Any, step: int) -> None:
        model = session.model
        with torch.random.fork_rng():  # dropout goes on as if nobody had looked
            rank, finding = self.look(model, step)
        model.train()
        log.looks.append((step, rank, finding))
        if self.keep_best and _best(log.looks) == len(log.looks) - 1:
            checkpoint.remember(session, 0.0 if rank is None else rank)


def _best(looks: list[tuple[int, float | None, dict[str, float]]]) -> int:
    """Index of the first of the highest rank."""
    return max(range(len(looks)), key=lambda n: (looks[n][1] is not None, looks[n][1] or 0.0, -n))


def chosen(looks: list[tuple[int, float | None, dict[str, float]]]) -> int:
    """The step of the best look."""
    return looks[_best(looks)][0]
