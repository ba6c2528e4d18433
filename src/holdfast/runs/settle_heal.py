"""Where no part of the change meets a budget: the short training of `repair --method heal`, at the end of a run.

It pulls the tuned model back towards the base on few-shot prompts of other tasks, and holds it where it is on rows of
the task. Unlike a line to the base it can keep the task and bring an ability back. What comes out is a whole model,
since the adapter of the run, if it has one, lies below that of this training.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from holdfast import models
from holdfast.engine.pack import TokenRow
from holdfast.engine.processes import world
from holdfast.runs.job import Job, base_of
from holdfast.runs.repair_heal import FEWEST, PROMPTS, SEED, STEPS, healing


def why_not(job: Job, soft: Any) -> str:
    """Why a run cannot be healed, "" if it can."""
    if soft is not None:
        return "its soft prompt stands outside of the weights"
    if world()[1] > 1:
        return "several processes share it"
    if job.recipe.model.load_in_4bit:
        return "its base has 4 bits"
    return "" if len(job.task.token_rows) >= FEWEST else f"it has fewer than {FEWEST} rows"


def healed(job: Job, tuned: Any, tell: Callable[[float, str], None]) -> Any:
    """A plain model, healed; `tuned` stays as it is."""
    dtype, label = job.model.dtype, f"The healed model of {job.source.label}"

    def plain() -> Any:
        own = copy.deepcopy(tuned)
        return models.merged(own, label) if hasattr(own, "peft_config") else own

    session = healing(
        partial(base_of, job.run, job.source), plain, job.tokenizer, lambda _: _rows(job), steps=STEPS, tell=tell
    )
    return models.merged(session.finished_model(dtype)[0], label)


def _rows(job: Job) -> list[TokenRow]:
    """Rows of the training, drawn."""
    rows = job.task.token_rows
    return [rows[n] for n in sorted(random.Random(SEED).sample(range(len(rows)), min(PROMPTS, len(rows))))]
