"""What a measurement can see: the loss that a check with these items finds, before any tuned model exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.special import ndtri

from holdfast.measure import stats

DISCORDANT = 0.1  # ours: share of items whose mark changes; tunings without loss of ability show 0.05 to 0.1
POWER = 0.9


@dataclass(frozen=True)
class Sight:
    """loss: the loss (a fraction of the score, 0.03 = 3 points) that is found with probability POWER.

    share: the same as a share of what the base has above chance; above 1, even a total loss may go unseen.
    items: how many independent items, spread evenly over the tasks, would see as much.
    """

    loss: float
    share: float
    items: float


def can_see(before: Mapping[str, Any], keep: float) -> Sight | None:
    """The smallest true loss, the same in every task, that `compare.ability` calls lost with probability POWER.

    Assumes that DISCORDANT of the items change their mark (more, and less is seen), and that items of one cluster of a
    clustered task count as one. Exact for 0/1 scores up to the normal approximation of `stats.detectable`; graded
    scores usually show smaller losses. It is for one ability: judged among others (Holm), a little more is needed.

    Args:
        before: the measurement of the base (`measure.asking.score_suite`).
        keep: the share of the ability that must be left.

    Returns:
        None if no task is measurable, so that no loss could be seen at all.
    """
    tasks = [_task(t) for t in before["tasks"]]
    tasks = [t for t in tasks if t is not None]
    if not tasks:
        return None
    weight = sum(w for w, _, _ in tasks)
    items = weight**2 / sum(w * w / n for w, n, _ in tasks)
    above = sum(w * x for w, _, x in tasks) / weight
    loss = max(stats.detectable(max(items, 1.0), DISCORDANT, POWER), _past((1 - keep) * above, items))
    return Sight(loss, loss / above, items)


def clusters_of(task: Mapping[str, Any]) -> list[str] | None:
    """What each item of a task shares with others, where the task says that this makes them dependent."""
    return [str(i["cluster"]) for i in task["items"]] if task.get("clustered") else None


def _task(task: Mapping[str, Any]) -> tuple[float, int, float] | None:
    """(weight 1 / (1 - chance), independent items, mean above chance) of a measurable task."""
    scores, chance = [float(i["correct"]) for i in task["items"]], task["chance"]
    clusters = clusters_of(task)
    if not stats.measurable(scores, clusters, chance):
        return None
    return 1 / (1 - chance), len(set(clusters)) if clusters else len(scores), sum(scores) / len(scores) - chance


def _past(margin: float, items: float) -> float:
    """The loss whose estimate exceeds the margin with probability POWER: 'lost' asks for that too."""
    loss = margin
    for _ in range(50):  # a contraction: the spread hardly depends on the loss
        spread = max(0.0, max(DISCORDANT, loss) - loss * loss)
        loss = margin + float(ndtri(POWER)) * math.sqrt(spread / items)
    return min(loss, 1.0)
