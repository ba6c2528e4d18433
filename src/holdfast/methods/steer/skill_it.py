"""Skill-It: sources of the data that help the skills which are still bad weigh more.

    w_i(t) = e_i / sum_j part_j e_j,   e_i = exp( eta * sum over the last `window` looks of sum_j A_ij L_j )
    part_i: what source i has of the mix's scored tokens, so that the weight of a token is 1 on average
    A_ii = 1;  A_ij: how much training on source i helps skill j (`graph`);  L_j: loss of skill j on held-out rows

A skill is a source of the mix: the task, its sets, and what other methods add to it, such as Replay. `targets` are the
skills whose losses count; () is all. As in the released code, with targets the mean over the looks stands in the
place of the sum, and until the first look the losses in the formula are 1. A source's token losses are weighted by
w_i. Where a source of the mix is streamed, parts are not known and count as equal.
Differences: Skill-It draws the next chunk of the data anew with shares p_i = prior_i * e_i / sum; here the order of
rows is fixed by the seed, and the weight of a row's loss stands for it, with the mix's own shares as prior: the
expected loss is the same, and a source of weight near 0 still costs its forward. The graph is given, not learnt (the
paper trains k^2 short runs for it).
`graph` lists [source, skill it helps, how much]; the paper's released graphs have 0.5 beside a diagonal of 1.
Of every source a part `cut`, chosen by content, never trains: those are the rows that are scored. With general text
as a source its weight rises by itself when the model gets worse at it.
The method says nothing where nothing helps anything else, or everything everything.
Cost: one forward of `rows` rows of each source every `every` steps. Combine with: everything; several sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer
from holdfast.methods.steer._sources import looked_at, weighing_one, with_text
from holdfast.services import Context

Edge = tuple[str, str, float]


@dataclass(frozen=True, kw_only=True)
class SkillIt(Method):
    """Skill-It's online weights (Chen et al., NeurIPS 2023), arXiv 2307.14430."""

    eta: float = 0.5  # the paper, LEGO; 0.8 for natural instructions
    window: int = 3  # the paper
    every: int = 100  # the paper, natural instructions, in steps: a sixth of the run
    graph: tuple[Edge, ...] = ()  # [source, skill, how much the source helps it], beside 1 for itself
    targets: tuple[str, ...] = ()  # skills whose losses count; () is all
    rows: int = 16  # ours: of each source
    cut: float = 0.1  # ours: part of the rows that never trains
    share: float = 0.0  # ours: part of the mix that is general text of its own
    sources: tuple[str, ...] = ("holdfast:general/instructions.jsonl",)  # ours: that text

    paper: ClassVar = Paper("Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models",
                            "2307.14430", "weights of losses stand for shares of the data")  # fmt: skip
    does: ClassVar = "weights the sources of the data by the held-out losses of the skills they help"

    def off(self) -> bool:
        return self.eta == 0

    def check(self, ctx: Context) -> None:
        if self.eta < 0 or min(self.window, self.every, self.rows) < 1:
            what = "SkillIt needs eta of at least 0, and window, every and rows of at least 1."
            raise PlanError(what, "Mend them.")
        if not 0 < self.cut < 1 or not 0 <= self.share < 1:
            raise PlanError("SkillIt needs cut above 0 and below 1, and share of 0 or more and below 1.", "Mend them.")
        if not all(_is_edge(e) for e in self.graph):
            what = f"SkillIt.graph is {list(self.graph)}."
            raise PlanError(
                what, "Give triples of a source, a skill and a number above 0, such as [[task, text, 0.5]]."
            )

    def prepare(self, ctx: Context) -> State:
        if 0 < ctx.total_steps <= self.every:
            what = (
                f"SkillIt looks at the losses every {self.every} steps; in a run of {ctx.total_steps} it never would."
            )
            raise PlanError(what, "Lower SkillIt.every, or take it out of the plan.")
        return {}

    def data(self, mix: Mix, ctx: Context) -> Mix:
        return with_text(mix, ctx, self.name, self.sources, self.share).hold_out(self.cut)

    def held_out(self, mix: Mix, ctx: Context) -> Mapping[str, Sequence[TokenRow]]:
        found = looked_at(mix, ctx, self.name, self.rows, "weights")
        named = [*self.targets, *(name for a, b, _ in self.graph for name in (a, b))]
        if strange := [name for name in named if name not in found]:
            what = f"SkillIt names {strange[0]!r}, but the sources with rows to look at are {', '.join(found)}."
            raise PlanError(what, "Use one of these names.")
        return found

    def looks(self, step: int) -> bool:
        return step % self.every == 0

    def steer(self, past: Past, state: State) -> Steer | None:
        kept = self._look(past, state) if past.held_out else {}
        weights = {
            n.removeprefix("weight/"): float(w) for n, w in {**state, **kept}.items() if n.startswith("weight/")
        }
        return Steer(source_weight=weights, state=kept) if weights else None

    def _look(self, past: Past, state: State) -> State:
        """The state after a look: losses of the last ones, and weights."""
        names = sorted(past.held_out)
        losses = state.get("losses", torch.zeros((len(names), 0), dtype=torch.float64)).cpu()
        if past.step:
            now = torch.tensor([past.held_out[n] for n in names], dtype=torch.float64)[:, None]
            losses = torch.cat([losses, now], 1)[:, -self.window :]
        seen = losses if losses.shape[1] else torch.ones((len(names), 1), dtype=torch.float64)
        losses_of = seen.mean(1) if self.targets else seen.sum(1)
        weights = weighing_one((self.eta * self.matrix(names) @ losses_of).softmax(0), names, past.parts)
        return {"losses": losses} | {f"weight/{n}": w for n, w in zip(names, weights, strict=True)}

    def matrix(self, names: Sequence[str]) -> torch.Tensor:
        """(K, K) how much the i-th source helps the j-th skill; 0 for skills that do not count."""
        a = torch.eye(len(names), dtype=torch.float64)
        for source, skill, value in self.graph:
            a[names.index(source), names.index(skill)] = value
        counts = torch.tensor([not self.targets or n in self.targets for n in names], dtype=torch.float64)
        return a * counts


def _is_edge(edge: object) -> bool:
    if not isinstance(edge, tuple) or len(edge) != 3:
        return False
    source, skill, value = edge
    return isinstance(source, str) and isinstance(skill, str) and isinstance(value, (int, float)) and value > 0
