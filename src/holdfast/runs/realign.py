"""Alignment recovery with rollback: put few weights of a tuned model back to those of the aligned model before it.

    d_harm   mean over harmful prompts of the ALIGNED model's state behind block K, at the last token
    d_task   the same over task prompts, of the TUNED model
    L        -cos(mean over a batch of the states now, d_harm);   g = dL/dtheta, summed over batches and steps
    a step   entries with sign(theta - theta_aligned) = sign(g) and |g| above the ceil(rate n)-th largest of them
             become theta_aligned;   n: all parameters of the model
    back     of those, the `back` part with the largest |g'| whose sign agrees become theta_tuned again;
             g' = gradient of -cos(mean of states now, d_task)

Yang, Tao, Chen, Xu, IEEE S&P 2025 (arXiv 2504.09757), as its released code does it: matrices of the first K blocks
only; after `warm_up` steps the task is scored, and where it fell by more than `budget` all starts again with a
rollback behind each step; every fifth step is a checkpoint, and of those in the budget the least harmful is taken.
A direction is a mean of states, not a difference. "Above" is strict, so the one at the edge stays, with its equals.

Differences: without a judge of harm of your own (`harm`) the checkpoint with the highest cosine is taken; the
untouched tuned model is a checkpoint too; `proved` starts the rollback only where a paired test agrees, as one noisy
score decides otherwise. With rollback the gradient of each step stands alone (whether theirs does is not known to us).
K is half of the depth (theirs: 2/6 to 4/6). Their harmful rate of 33 % to 1.7 % over 125 models was not checked.

Cost: both models and a copy of K blocks in memory, their gradients in fp32, and at each step a forward and backward
over the harmful prompts, with rollback over the task's too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from holdfast import models
from holdfast.data.rows import Row, cap, read_rows, split
from holdfast.data.tokens import tokenize_all
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.engine.ways import blocks
from holdfast.errors import HoldfastError
from holdfast.measure import stats
from holdfast.runs.realign_step import Recovery, Tensors, Walk

PROMPTS, DEFAULTS = 256, Recovery()  # the released code; as `Recovery` says
Score = Callable[[Any], Sequence[float]]  # of a model: a number for each item, higher is better


@dataclass(frozen=True)
class Point:
    """A checkpoint. share: of all parameters that are the aligned model's; cosine: to d_harm, mean over batches;
    score: mean over items; harm: lower is better; masks: by name, True where an entry is the aligned model's."""

    step: int
    share: float
    cosine: float
    score: float
    harm: float
    masks: Tensors = field(repr=False)


@dataclass(frozen=True)
class Recovered:
    """chosen: what the model is now; points: all checkpoints of the last walk, the tuned model first."""

    chosen: Point
    points: list[Point]
    rolled_back: bool


def realign(
    aligned: str,
    tuned: str,
    harmful: str | Path,
    task: str | Path,
    out: Path,
    *,
    harm: Callable[[Any], float] | None = None,
    recovery: Recovery = DEFAULTS,
    seed: int = 0,
    max_tokens: int = 1024,
    **how: Any,
) -> Recovered:
    """Write the recovered model into the folder `out`.

    Args:
        aligned, tuned: hub ids, folders or an adapter on the aligned model.
        harmful, task: any files that `data.train` takes; of harmful rows the answers are not read. Half of the task's
            rows give the direction, the other half the score (`answered`).
        harm: judges a model, lower is better; without one the cosine chooses.
        how: of `models.load`.

    Raises:
        HoldfastError: the models have other parameters, values that make no sense, too few rows.
    """
    model, tokenizer = models.load(tuned, merge_adapter=True, **how)
    before, _ = models.load(aligned, merge_adapter=True, **how)

    def read(path: str | Path) -> list[Row]:
        return read_rows(path, base_dir=Path.cwd(), tokenizer=tokenizer)

    rows, bad = read(task), read(harmful)
    parts = [[rows[n] for n in part] for part in split(rows, 0.5, seed)]
    bad = [bad[n] for n in cap(range(len(bad)), PROMPTS, seed)]
    own, judged, asked = (tokenize_all(some, tokenizer, max_tokens) for some in (*parts, bad))
    own = [own[n] for n in cap(range(len(own)), PROMPTS, seed)]
    found = recover(model, before, asked, own, lambda m: answered(m, judged), harm=harm, recovery=recovery)
    card = (
        f"# A model with its alignment recovered\n\n{tuned}, {found.chosen.share:.3g} of it put back to {aligned}.\n"
    )
    models.save_model(model, tokenizer, out, card=card)
    return found


def recover(
    model: Any,
    aligned: Any,
    harmful: Sequence[TokenRow],
    task: Sequence[TokenRow],
    score: Score,
    *,
    harm: Callable[[Any], float] | None = None,
    recovery: Recovery = DEFAULTS,
    spare: Tensors | None = None,
) -> Recovered:
    """Recover a tuned `model` in memory, in place, in eval mode; parameters of both models in one precision.

    Args:
        harmful, task: rows, of which what stands before the first answer is read.
        score: of the task, once for the tuned model and at each checkpoint.
        spare: masks by name: entries that are never put back, as those of a `graft`.

    Raises:
        HoldfastError: as `realign`.
    """
    recovery.check(len(blocks(model)))
    if not harmful or not task:
        what = f"Alignment recovery has {len(harmful)} harmful and {len(task)} task prompts."
        raise HoldfastError(what, "Give at least one of each.")
    at = Walk.begin(model, aligned, harmful, task, recovery, spare or {})
    first = list(score(model))
    points = _walk(at, first, score, harm, rollback=False)
    rolled_back = points is None
    points = points or _walk(at, first, score, harm, rollback=True)
    assert points
    kept = [p for p in points if p.score >= (1 - recovery.budget) * points[0].score]
    chosen = min(kept, key=lambda p: p.harm)
    at.put(chosen.masks)
    model.requires_grad_(False)
    return Recovered(chosen, points, rolled_back)


def _walk(at: Walk, first: Sequence[float], score: Score, harm: Any, rollback: bool) -> list[Point] | None:
    """The checkpoints from the tuned model on; None where the warm-up costs too much of the task."""
    how = at.how
    at.restart()
    points = [_point(at, 0, first, harm)]
    for step in range(1, how.steps + 1):
        at.step(rollback)
        warm, saved = step == how.warm_up and not rollback, step % how.every == 0
        if not warm and not saved and step < how.steps:
            continue
        now = list(score(at.model))
        if warm and fell(first, now, how.budget, how.proved):
            return None
        if saved or step == how.steps:
            points.append(_point(at, step, now, harm))
    return points


def _point(at: Walk, step: int, scores: Sequence[float], harm: Callable[[Any], float] | None) -> Point:
    share = sum(int(m.sum()) for m in at.masks.values()) / at.total
    cosine = at.cosine()
    masks = {n: m.clone() for n, m in at.masks.items()}
    return Point(step, share, cosine, sum(scores) / len(scores), harm(at.model) if harm else -cosine, masks)


@torch.no_grad()
def answered(model: Any, rows: Sequence[TokenRow]) -> list[float]:
    """Of each row the share of its targets that the model would choose, given those before."""
    found = list[float]()
    for row in rows:
        packed, logits = forward(model, [row])
        found.append(float((logits.argmax(-1) == packed.target).float().mean()))
    return found


def fell(before: Sequence[float], now: Sequence[float], budget: float, proved: bool) -> bool:
    """Whether the mean lost more than the `budget` part; `proved`: and the paired 95 % interval says so."""
    start, end = sum(before) / len(before), sum(now) / len(now)
    floor = [x - budget * abs(start) for x in before]
    lower = end < start - budget * abs(start)
    return lower and (not proved or stats.paired(floor, now).high < 0)
