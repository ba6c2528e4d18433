"""Parameter sensitivity: put groups of base weights back into the tuned model and see what loss comes back.

    loss          mean -log p(right answer) in nats over a few in-context questions
    damage        loss(tuned) - loss(base)
    regained(m)   loss(tuned) - loss(tuned with group m set back to the base)        "reset"
    alone(m)      loss(base with only group m of the tuned model) - loss(base)       "transplant", best group only
    drift(m)      ||D_m||_F / ||W_m||_F, the cheap predictor; its Spearman correlation with regained(m) is reported

Reset and transplant are common practice and the ground truth beside cheaper predictors (first order |<g, D>|, Fisher
1/2 sum F D^2), which are left out: they need a backward pass and a gradient of the model's size. No paper owns it.
Ours: groups are the embeddings, at most 6 runs of neighbouring layers, and norm with head, not single projections; 16
questions of 4 tasks (those that lost most in the measurements, if there are any); each group is reset by itself, not
one after the other until 80 % is recovered. Resets are not additive: regained parts need not sum to the damage.

The rule (ours): without damage beyond its 95 % interval nothing is unusual; the place is named if its reset regains at
least half of the damage, and the loss counts as spread otherwise. Cost: one pass over the weights, at most 11 forwards
of about 450 tokens; weights are swapped by reference, no copy is made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import Pair, blocks, pairs, relative, share
from holdfast.measure import stats
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask, Suite
from holdfast.measure.suites.in_context import shuffled, suite_of
from holdfast.measure.tasks import HeldOutTask, held_out_tasks

TASKS, ITEMS, SHOTS = 4, 4, 4  # ours: 16 questions; those of a task share one prefix
RUNS = 6  # ours: groups of layers
MOST = 0.5  # ours: a group is named if its reset regains this share of the damage


@dataclass
class Group:
    """Parameters that are put back together; drift is ||D|| / ||W||."""

    name: str
    pairs: list[Pair] = field(default_factory=list)
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    regained: float = 0.0

    @property
    def drift(self) -> float:
        return relative(self.squares)


def groups_of(case: Case) -> list[Group]:
    """Embeddings, runs of layers, norm and head; with their changed parameters only."""
    depth = len(blocks(case.base)[1])
    runs = min(RUNS, depth)
    found: dict[str, Group] = {}
    for pair in pairs(case):
        name = _run_name(pair.place * runs // depth, runs, depth) if isinstance(pair.place, int) else pair.place
        group = found.setdefault(name, Group(name))
        squares = pair.squares()
        group.squares = [a + b for a, b in zip(group.squares, squares, strict=True)]
        if squares[0]:
            group.pairs.append(pair)
    return list(found.values())


def _run_name(run: int, runs: int, depth: int) -> str:
    inside = [n for n in range(depth) if n * runs // depth == run]
    return f"layer {run}" if runs == depth else f"layers {inside[0]} to {inside[-1]}"


@contextmanager
def swapped(group: Group, *, into_base: bool = False) -> Iterator[None]:
    """The tuned model with a group of the base's weights (or the other way round), for the duration."""
    ends = [(p.base, p.tuned) if into_base else (p.tuned, p.base) for p in group.pairs]
    kept = [target.data for target, _ in ends]
    new = [source.data.to(device=target.device, dtype=target.dtype) for target, source in ends]
    try:
        for (target, _), data in zip(ends, new, strict=True):
            target.data = data
        yield
    finally:
        for (target, _), data in zip(ends, kept, strict=True):
            target.data = data


def questions(case: Case) -> Suite:
    """16 held-out questions: of the tasks that lost most, else of tasks drawn by the seed."""
    lost = _losses(case)
    tasks: Sequence[HeldOutTask] = sorted(
        shuffled(f"sensitivity/{case.seed}", held_out_tasks()), key=lambda t: -lost.get(t.name, 0.0)
    )
    ask = Ask(case.tokenizer, num_fewshot=SHOTS, limit=ITEMS, seed=case.seed)
    return suite_of(tasks[:TASKS], ask, formats=["qa"])


def _losses(case: Case) -> dict[str, float]:
    """Mean score lost by task of the in-context measurements; empty without them."""
    scores: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, measured in enumerate((case.before, case.after)):
        for task in (t for m in measured if m["suite"] == "in-context" for t in m["tasks"]):
            items = task["items"]
            scores[task["name"]][side] = sum(i["correct"] for i in items) / max(1, len(items))
    return {name: before - after for name, (before, after) in scores.items()} if case.before and case.after else {}


def losses(model: torch.nn.Module, case: Case, suite: Suite) -> list[float]:
    """-log p of the right answer of every question, nats."""
    measured = score_suite(model, case.tokenizer, suite)
    return [-item["logprob"] for task in measured["tasks"] for item in task["items"]]


def diagnose(case: Case) -> Finding:
    """Name the group of weights whose reset regains the lost likelihood."""
    groups = [g for g in groups_of(case) if g.pairs]
    if not groups:
        return Finding("parameter sensitivity", f"{NOTHING}: base and tuned have the same weights.", scores={})
    suite = questions(case)
    base, tuned = losses(case.base, case, suite), losses(case.tuned, case, suite)
    damage = stats.paired(base, tuned)
    if not damage.low > 0:
        sentence = (
            f"{NOTHING}: the tuned model's loss on {len(base)} held-out questions is not clearly above the base's."
        )
        return Finding("parameter sensitivity", sentence, _change(damage), scores={"damage": damage.value})
    for group in groups:
        with swapped(group):
            group.regained = stats.mean(tuned).value - stats.mean(losses(case.tuned, case, suite)).value
    best = max(groups, key=lambda g: g.regained)
    with swapped(best, into_base=True):
        alone = stats.paired(base, losses(case.base, case, suite)).value
    return _finding(groups, best, damage, alone)


def _change(damage: stats.Estimate) -> str:
    span = f"{damage.low:+.3g} to {damage.high:+.3g}"
    return f"Loss changes by {damage.value:+.3g} nats an answer (95 % interval {span})."


def _finding(groups: list[Group], best: Group, damage: stats.Estimate, alone: float) -> Finding:
    part = best.regained / damage.value
    named = part >= MOST
    sentence = (
        f"The lost likelihood sits in {best.name}: putting the base's weights back there regains {share(part)} of it."
        if named
        else f"The lost likelihood is spread: the best single reset, {best.name}, regains {share(part)}."
    )
    order = sorted(groups, key=lambda g: -g.regained)
    rows = [[g.name, share(g.drift), f"{g.regained:+.3g}", share(g.regained / damage.value)] for g in order]
    return Finding(
        "parameter sensitivity",
        sentence,
        f"{_change(damage)} The change of {best.name} alone, put into the base, costs {alone:+.3g}."
        f"{_agreement(groups)} Parts need not sum to the whole.",
        [["Put back", "Change of weights", "Loss regained, nats", "Share of the loss"], *rows],
        {"damage": damage.value, "regained": part, "alone": alone},
    )


def _agreement(groups: list[Group]) -> str:
    if len({g.drift for g in groups}) < 3 or len({g.regained for g in groups}) < 3:
        return ""
    from scipy.stats import spearmanr

    result: Any = spearmanr([g.drift for g in groups], [g.regained for g in groups])
    rho = result.statistic
    return f" Size of the change and regained loss correlate at {rho:+.2f} (Spearman)."
