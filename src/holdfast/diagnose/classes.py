"""Class separability: do the classes of tasks that nobody trained on lie nearer to each other than before?

    E       mean of the last hidden states of each of n texts, centred, scaled to length 1
    S       1 - normalised entropy of the edges of E's minimum spanning tree (no labels), as in `ClassSeparability`
    near    share of texts whose nearest neighbour has the same label (Thornton's index)
    Fisher  tr(S_b) / tr(S_w): spread between the classes' means over that inside the classes

Ghalyan et al., TMLR 2024 (2305.15016) watch a score of the spanning tree while a classifier is tuned; their own score
was not verified, so S is ours. They want the classes of the task to part; here it is the texts of held-out tasks with
a closed set of labels, whose classes should stay apart. A finding needs the paired interval of `near` over all texts
to lie below 0, by MARGIN of the base's at least.

Cost: one forward of both models for each of up to 24 texts of each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.data.encoder import Encoder
from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import share
from holdfast.measure import stats
from holdfast.measure.suites.in_context import shuffled
from holdfast.measure.tasks import Task, held_out_tasks
from holdfast.methods.steer.class_separability import embed, separability

TEXTS = 24  # ours, of a task
MARGIN = 0.05  # ours: losing less than this part of the base's score is nothing unusual


@dataclass(frozen=True)
class Apart:
    """How far apart the classes of n texts lie. near: (n,) 0 or 1."""

    near: np.ndarray
    fisher: float
    score: float


def apart(embeddings: np.ndarray, labels: Sequence[str]) -> Apart:
    """Measure labelled embeddings (n, D), n > 2."""
    points = embeddings - embeddings.mean(0)
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    own = np.asarray(labels)
    near = (own[distance.argmin(1)] == own).astype(float)
    return Apart(near, fisher(points, own), separability(embeddings))


def fisher(points: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squares of the classes' means around the whole mean, over that of points around their class's mean."""
    between = within = 0.0
    for label in np.unique(labels):
        mine = points[labels == label]
        between += len(mine) * float(((mine.mean(0) - points.mean(0)) ** 2).sum())
        within += float(((mine - mine.mean(0)) ** 2).sum())
    return between / within if within else float("inf")


def diagnose(case: Case) -> Finding:
    """Embed the texts of held-out tasks with labels in both models."""
    return compare(case, [t for t in held_out_tasks() if t.labels])


def compare(case: Case, tasks: Sequence[Task]) -> Finding:
    """As `diagnose`, on tasks of one's own with a closed set of labels."""
    encoder, found = Encoder(case.tokenizer), {}
    for task in tasks:
        items = shuffled(f"classes/{task.name}/{case.seed}", task.items)[:TEXTS]
        rows = [torch.tensor(ids) for ids in encoder.prompts([x for x, _ in items])]
        found[task.name] = [_of(m, rows, [y for _, y in items]) for m in (case.base, case.tuned)]
    base, tuned = (np.concatenate([both[n].near for both in found.values()]) for n in (0, 1))
    change = stats.paired(base, tuned)
    rows = [_row(name, *both) for name, both in found.items()]
    means = [float(np.mean([both[n].score for both in found.values()])) for n in (0, 1)]
    return Finding(
        "class separability",
        _sentence(found, float(base.mean()), float(tuned.mean()), change),
        f"The nearest neighbour has the same label for {share(float(base.mean()))} of {len(base)} texts in the base,"
        f" for {share(float(tuned.mean()))} in the tuned model: {change.value:+.3f} ({change.low:+.3f} to"
        f" {change.high:+.3f}). Without labels, the score of the spanning tree is {means[0]:.3f} and {means[1]:.3f}.",
        [["task", "near, base", "near, tuned", "Fisher, base", "Fisher, tuned", "tree, base", "tree, tuned"], *rows],
        {"base": float(base.mean()), "tuned": float(tuned.mean()), "change": change.value},
    )


def _of(model: Any, rows: Sequence[torch.Tensor], labels: Sequence[str]) -> Apart:
    return apart(embed(model, rows), labels)


def _row(name: str, base: Apart, tuned: Apart) -> list[Any]:
    near = [f"{x.near.mean():.2f}" for x in (base, tuned)]
    return [name, *near, *(f"{x.fisher:.2f}" for x in (base, tuned)), *(f"{x.score:.3f}" for x in (base, tuned))]


def _sentence(found: dict[str, list[Apart]], base: float, tuned: float, change: stats.Estimate) -> str:
    if change.high >= 0 or tuned > (1 - MARGIN) * base:
        return f"{NOTHING}: the classes of {len(found)} held-out tasks lie as far apart as in the base."
    worst = min(found, key=lambda n: found[n][1].near.mean() - found[n][0].near.mean())
    return (
        f"The classes of held-out tasks have drawn together: the nearest neighbour shares the label for {share(tuned)}"
        f" of the texts, {share(base)} in the base; most of all in {worst}."
    )
