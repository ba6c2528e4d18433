"""`training.learning_rate: search`: short trainings at rates around `auto`, and the rate of the best, with care.

    rates: 3^k times auto, k = 0 and 1, then on in the direction that is better while it is, k from -2 to 2
    best = the lowest whose loss is within one standard error of the lowest loss
    rate = best where the trials are as long as the run, else best / 3

So there are three or four trials of at most 24 steps, of the recipe's own plan, each from the untouched model, with
the first rows of the run and a linear course. Loss: of the validation rows' answers, the mean over rows of the mean
over tokens; the standard error is of the paired difference (the one-standard-error rule of Breiman et al., 1984).
Short trainings are kind to high rates, which get far in few steps, and high rates cost abilities: hence the lowest,
and the third, as fast.ai takes a tenth of the best rate of a range test. In 24 steps on the tickets the default plan
is best at 4.5e-3 (of 1.5e-3, 4.5e-3 and 1.3e-2), where whole runs are no better at 3e-3 than at 1e-3. A trial whose
loss is not finite is out. Abilities are not measured: the plan that protects them is trained, and the report judges.
Steps, rows and factors are ours.

What a trial found is in rates.json under the content it depends on, so a killed search goes on with the next rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from holdfast.errors import TrainingError
from holdfast.files import content_key
from holdfast.hosts import plain
from holdfast.hosts.rewind import rewound
from holdfast.measure.tuned_task import score_task
from holdfast.runs.halves import choosing_rows
from holdfast.runs.rate import ROWS, STEPS, Rate, rounded
from holdfast.runs.work import Job

FACTOR, MOST = 3.0, 2  # between neighbours; k of the outermost
FOUND = "rates.json"  # in the run folder
Losses = Sequence[float]  # of the validation rows, in order
Found = dict[int, Losses | None]  # k -> what its trial came to; None: it diverged


def searched(job: Job) -> Rate:
    """The rate for the run. The model is untouched before and after.

    Raises:
        TrainingError: every trial diverged.
    """
    middle, key = job.rate.value, _key(job)
    kept = job.run.folder.read(FOUND) or {}
    known: dict[str, Losses | None] = kept["found"] if kept.get("of") == key else {}

    def ask(k: int) -> Losses | None:
        if str(k) not in known:
            job.run.tell("rates", len(known) / (MOST + 2), f"learning rate {rate_at(middle, k):g}")
            known[str(k)] = _trial(job, rate_at(middle, k))
            job.run.folder.write(FOUND, {"of": key, "found": known})
        return known[str(k)]

    with job.run.timed("rates"):
        found = walk(ask)
    if not any(found.values()):
        what = f"The training diverged at every learning rate that was tried, down to {rate_at(middle, min(found)):g}."
        raise TrainingError(what, "Look at the rows, or write a much lower training.learning_rate.")
    best = choose(found)
    tried = tuple((rate_at(middle, k), mean(found[k]) if found[k] else None) for k in sorted(found))
    value = rate_at(middle, best - shorter(job.training.num_steps))
    part = "a third of " if shorter(job.training.num_steps) else ""
    why = (
        f"search: {part}the lowest of {len(found)} rates, tried for {_steps(job)} steps each, that is within one "
        f"standard error of the best loss on {len(found[best] or ())} validation rows"
    )
    return Rate(value, why, tried)


def rate_at(middle: float, k: int) -> float:
    """The rate of trial k, to two digits."""
    return rounded(middle * FACTOR**k)


def shorter(steps: int) -> int:
    """How many factors below the best trial a run of so many steps stays."""
    return int(steps > STEPS)


def walk(ask: Callable[[int], Losses | None]) -> Found:
    """Try 0 and 1, and go on from the better one, away from the other, while it gets better."""
    found: Found = {0: ask(0), 1: ask(1)}
    way = 1 if mean(found[1]) < mean(found[0]) else -1
    at = max(0, way)
    while abs(at + way) <= MOST:
        at += way
        found[at] = ask(at)
        if found[at] is not None and mean(found[at]) >= mean(found[at - way]):
            break
    return found


def choose(found: Found) -> int:
    """The lowest k that is within one standard error of the best."""
    best = min(found, key=lambda k: mean(found[k]))
    return min(k for k, losses in found.items() if losses and _near(losses, found[best] or losses))


def _near(losses: Losses, best: Losses) -> bool:
    apart = np.subtract(losses, best)
    error = apart.std(ddof=1) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
    return bool(apart.mean() <= error)


def mean(losses: Losses | None) -> float:
    """Infinity for a trial that diverged."""
    return math.inf if losses is None else float(np.mean(losses))


# ---- one trial


def _steps(job: Job) -> int:
    return min(STEPS, job.training.num_steps)


def _trial(job: Job, rate: float) -> Losses | None:
    """Train a little at `rate`, score the validation rows, and undo it; None where it diverged."""
    short = dataclasses.replace(
        job.training,
        num_steps=_steps(job),
        learning_rate=rate,
        lr_scheduler_type="linear",
        lr_scheduler_kwargs={},
        warmup_steps=0.1,
        save_steps=0,
        logging_steps=1,
        folder=None,
        watch=None,
    )
    with rewound(job.session):
        try:
            plain.train(job.session, job.mix, short)
        except TrainingError:  # the loss is not finite
            return None
        with job.session.between_steps():
            scored = score_task(job.session.model, job.tokenizer, choosing_rows(job)[:ROWS], None)
    losses = [-i["logprob"] / i["tokens"] for i in scored]
    return losses if all(map(math.isfinite, losses)) else None


def _key(job: Job) -> str:
    """What the outcome of a trial depends on."""
    apart: Any = {"training": {"output_dir"}, "measure": True, "export": True}
    said = job.recipe.model_dump(exclude=apart)
    return content_key(job.inputs(), said, job.rate.value)
