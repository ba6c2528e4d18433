"""Where the change does not meet a budget: the short training of `repair --method heal`, at the end of a run.

It pulls the tuned model back towards the base on few-shot prompts of other tasks, and holds it where it is on rows of
the task. Unlike a line to the base it can keep the task and bring an ability back. Where the run trained an adapter of
plain LoRA, `joined` makes one of both; else what comes out is a whole model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from holdfast import models
from holdfast.engine.pack import TokenRow
from holdfast.method import canonical
from holdfast.methods.adapt._adapter import Adapter
from holdfast.runs.job import base_of, order_of
from holdfast.runs.repair_heal import PROMPTS, SEED, healing
from holdfast.runs.work import Job
from holdfast.session import LORA_B

FAR = 0.1  # ours: of a share kept below its bound
STEPS = (24, 48)  # ours: of the training near to the bound and far from it (docs/decisions.md)
FRESH = 1  # seed of the prompts: the plan may have trained on those of 0


class Healed:
    """A tuned model with what was trained to heal it as an adapter, of which a share can be taken.

    Attributes:
        model: computes with the adapter; used up by `plain`.
    """

    def __init__(self, model: Any, label: str):
        self.model, self._label = model, label
        self._whole = {n: p.detach().clone() for n, p in model.named_parameters() if LORA_B.search(canonical(n))}

    @torch.no_grad()
    def scale(self, share: float) -> None:
        """Take `share` of the change; 1 is all of it, exactly."""
        for name, p in self.model.named_parameters():
            if name in self._whole:
                p.copy_(share * self._whole[name])

    def plain(self) -> Any:
        """The plain model that computes the same."""
        return models.merged(self.model, self._label)


def heal(job: Job, tuned: Any, below: float, tell: Callable[[float, str], None]) -> Healed:
    """Train; `tuned` stays as it is. below: how far the ability that is nearest to its own bound lies below it."""
    dtype, label = job.model.dtype, f"The healed model of {job.source.label}"

    def plain() -> Any:
        own = copy.deepcopy(tuned)
        return models.merged(own, label) if hasattr(own, "peft_config") else own

    base, rows, steps = partial(base_of, job.run, job.source), lambda _: _rows(job), STEPS[below > FAR]
    session = healing(
        base,
        plain,
        job.tokenizer,
        rows,
        steps=steps,
        tell=tell,
        seed=FRESH,
        at_once=job.training.batch_size,  # what the training had room for
        targets=_targets(job),
        texts=job.session.ctx.rows,
    )
    return Healed(session.finished_model(dtype)[0], label)


def _targets(job: Job) -> Any:
    """The maps beside which the plan's own adapter stands, or all."""
    return next((m.target_modules for m in job.session.methods if isinstance(m, Adapter)), "all-linear")


def _rows(job: Job) -> list[TokenRow]:
    """Rows of the training, drawn: of several sets with weights as often as the training draws each."""
    rows, order = job.task.token_rows, order_of(job.run)
    drawn = order(rows, SEED, 0)[:PROMPTS] if order else _some(len(rows))
    return [rows[n] for n in sorted(drawn)]


def _some(count: int) -> list[int]:
    return random.Random(SEED).sample(range(count), min(PROMPTS, count))
