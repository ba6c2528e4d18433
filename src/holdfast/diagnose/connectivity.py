"""Mode connectivity: is there a ridge on the straight line between two models, where both abilities are worse?

    theta(u) = (1 - u) theta_a + u theta_b,   u = 0, 0.1, ..., 1;   L_i(u) the loss of item i there
    barrier = max_u L(u) - max(L(0), L(1)),   L the mean over items

Ren et al. 2024 (2402.18865) find low-loss valleys between the minima of neighbouring tasks; it was read in abstract
and code. In `diagnose` the two are base and tuned model and the items are few-shot questions of held-out tasks, so
that the line is that of WiSE-FT: without a ridge, going back part of the way makes sense. `curve` takes any two models
and any loss, such as two tuned models and the rows of their tasks.

Ours: the ridge is one where the paired interval of L_i(u) - L_i(worse end), at a level shared out over the inner
points, lies above 0. Points are interpolated in fp32 and rounded to the model's precision: at bf16, a barrier of the
size of rounding is none. Weights are interpolated, for adapters merge them first.

Cost: 11 measurements of two few-shot items of each held-out task, and a third model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.errors import ModelError
from holdfast.measure import stats
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask
from holdfast.measure.suites.in_context import suite_of
from holdfast.measure.tasks import held_out_tasks

POINTS = 11  # the paper's grid
SHOTS, ITEMS = 4, 2  # ours: demonstrations, and questions of a task


@dataclass(frozen=True)
class Curve:
    """Losses (points, N) along the line, and where the points lie."""

    at: np.ndarray
    losses: np.ndarray

    @property
    def means(self) -> np.ndarray:
        return self.losses.mean(1)

    @property
    def barrier(self) -> float:
        """How far the highest point lies above the higher end; 0 or less on a line without a ridge."""
        return float(self.means.max() - max(self.means[0], self.means[-1]))

    @property
    def top(self) -> int:
        """The highest inner point."""
        return 1 + int(self.means[1:-1].argmax())

    def ridge(self) -> stats.Estimate:
        """The paired interval of the highest inner point over the higher end."""
        end = 0 if self.means[0] >= self.means[-1] else -1
        return stats.paired(self.losses[end], self.losses[self.top], level=1 - 0.05 / (len(self.at) - 2))


@torch.no_grad()
def between(a: Any, b: Any, into: Any, u: float) -> None:
    """Give `into` the weights at u, computed in fp32; 0 and 1 are the two models to the last bit.

    Raises:
        ModelError: the two do not have the same parameters.
    """
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in second.items()}:
        what = "There is no line between two models with other parameters."
        raise ModelError(what, "Give two of the same architecture, adapters merged.")
    for name, p in into.named_parameters():
        p.copy_(torch.lerp(first[name].float(), second[name].to(first[name].device).float(), u))


def curve(a: Any, b: Any, losses: Callable[[Any], Sequence[float]], points: int = POINTS) -> Curve:
    """Losses of the same items at `points` models from `a` to `b`, which stay as they are."""
    middle, at = copy.deepcopy(a), np.linspace(0, 1, points)
    found = []
    for u in at:
        between(a, b, middle, float(u))
        found.append(np.asarray(losses(middle), dtype=float))
    return Curve(at, np.stack(found))


def diagnose(case: Case) -> Finding:
    """The line from base to tuned model, on held-out tasks."""
    suite = suite_of(held_out_tasks(), Ask(case.tokenizer, SHOTS, ITEMS, case.seed))

    def losses(model: Any) -> list[float]:
        tasks = score_suite(model, case.tokenizer, suite)["tasks"]
        return [-i["logprob"] for t in tasks for i in t["items"]]

    return told(curve(case.base, case.tuned, losses))


def told(line: Curve) -> Finding:
    """A curve in words."""
    ridge, best = line.ridge(), int(line.means.argmin())
    ends = f"{line.means[0]:.3f} in the base and {line.means[-1]:.3f} in the tuned model"
    if ridge.low > 0:
        sentence = (
            f"There is a ridge between base and tuned model: at u = {line.at[line.top]:g} the loss on held-out tasks"
            f" lies {line.barrier:.3f} nats an answer above the worse of the two, so weights between them help little."
        )
    else:
        sentence = (
            f"{NOTHING}: no ridge lies between base and tuned model on held-out tasks; the loss is lowest at"
            f" u = {line.at[best]:g}."
        )
    return Finding(
        "mode connectivity",
        sentence,
        f"Loss of an answer of {line.losses.shape[1]} few-shot items: {ends}. The highest point between them, u ="
        f" {line.at[line.top]:g}, against the worse end: {ridge.value:+.3f} ({ridge.low:+.3f} to {ridge.high:+.3f},"
        " corrected for the number of points).",
        [["u", "loss"], *([f"{u:g}", f"{x:.3f}"] for u, x in zip(line.at, line.means, strict=True))],
        {"barrier": line.barrier, "best": float(line.at[best])},
    )
