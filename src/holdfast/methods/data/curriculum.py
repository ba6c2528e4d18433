"""Curriculum: begin with the easy rows of the task and let harder ones in as training goes on.

    the n-th row of the task is drawn from the easiest p(n) of N,   u = min(1, n / (epochs * N))
    linear:  p = N * (start + (1 - start) * u)
    log:     p = N * (start + (1 - start) * (1 + 0.1 * ln(u + e^-10)))

Easy is short (by "length", tokens) or cheap for the base (by "loss", its mean nats a token of the answer, measured
once before training). Inside the pool every row is as likely as another. Once the pool holds all rows they come in
shuffled rounds as always, each once. start 1 is no curriculum. The order depends on the seed and on how many rows
were drawn: a resumed run goes on in it.
Differences: published pacing counts steps of the run; here it counts rounds of the task's rows (`epochs`), so that the
order of a row does not depend on the batch size. In the papers at hand such orders rarely beat chance; what comes last
decides what is forgotten, so `hardest_first` ends a run on easy rows.
Cost: none by length; by loss one forward of the task's rows, also in `holdfast explain`.
Combine with: everything that does not order the task's rows itself.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from holdfast.data.mix import Mix
from holdfast.engine.base import token_logp
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class Curriculum(Method):
    """Easy to hard, with the pacing functions of arXiv 2012.03107."""

    by: str = "loss"  # "length" or "loss"; the loss of the initial model, as Skill-It's baseline (arXiv 2307.14430)
    pacing: str = "linear"  # Skill-It's baseline; or "log"
    start: float = 0.1  # ours: part of the rows that the pool begins with
    epochs: float = 1.0  # ours: rounds of the task's rows until the pool holds all
    hardest_first: bool = False  # ours

    paper: ClassVar = Paper("When Do Curricula Work?", "2012.03107",
                            "the pacing functions read in a summary and in code that follows it")  # fmt: skip
    does: ClassVar = "orders the task's rows from easy to hard, by length or by the base's loss"
    writes: ClassVar = frozenset({"order"})

    def off(self) -> bool:
        return self.start == 1

    def check(self, ctx: Context) -> None:
        if self.by not in ("length", "loss"):
            raise PlanError(f"Curriculum.by is {self.by!r}.", "Use 'length' or 'loss'.")
        if self.pacing not in ("linear", "log"):
            raise PlanError(f"Curriculum.pacing is {self.pacing!r}.", "Use 'linear' or 'log'.")
        if not 0 < self.start <= 1:
            raise PlanError(f"Curriculum.start is {self.start}.", "Use a part of the rows, above 0 and at most 1.")
        if self.epochs <= 0:
            raise PlanError(f"Curriculum.epochs is {self.epochs}.", "Use a number above 0.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        hard = dict(zip((r.key for r in mix.task), self.difficulty(mix.task, ctx), strict=True))

        def order(rows: Sequence[TokenRow], seed: int, turn: int) -> list[int]:
            return self.order([hard[r.key] for r in rows], seed, turn)

        return mix.with_order(order)

    def difficulty(self, rows: Sequence[TokenRow], ctx: Context) -> list[float]:
        """A number for each row, larger for harder ones."""
        if self.by == "length":
            return [float(len(r.ids)) for r in rows]
        return [float(-logp.mean()) if len(logp) else 0.0 for logp in token_logp(ctx.model, rows)]

    def order(self, difficulty: Sequence[float], seed: int, turn: int) -> list[int]:
        """The rows of one round, as indices: the n-th from the easiest `pool` of them."""
        size = len(difficulty)
        sign = -1 if self.hardest_first else 1
        easiest = sorted(range(size), key=lambda i: sign * difficulty[i])  # stable: rows as hard stay as they came
        draw, everything = random.Random(f"{seed}/Curriculum/{turn}"), list(range(size))
        draw.shuffle(everything)
        pools = [self.pool(turn * size + n, size) for n in range(size)]
        return [everything[n] if p == size else easiest[draw.randrange(p)] for n, p in enumerate(pools)]

    def pool(self, drawn: int, size: int) -> int:
        """How many of the `size` rows may come after `drawn` of them came, at least 1."""
        u = min(1.0, drawn / (self.epochs * size))
        grown = u if self.pacing == "linear" else min(1.0, 1 + 0.1 * math.log(u + math.exp(-10)))
        return min(size, max(1, math.ceil(size * (self.start + (1 - self.start) * grown) - 1e-9)))
