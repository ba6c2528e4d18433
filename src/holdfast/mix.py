"""The training mix: the task's rows and what methods add, drawn in one fixed order.

Shares are exact by construction: rows are dealt by largest deficit, so after every row each source is within one row
(or one row's tokens) of its share. The order depends on the seed alone, so a resumed run needs no iterator state.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError

Map = Callable[[TokenRow], TokenRow]


@dataclass(frozen=True)
class Source:
    """Rows beside the task's.

    rows: a sequence (shuffled every round, repeated as often as needed) or a function returning a fresh iterator
        (streamed in its own order, started again when it ends).
    share: part of the whole mix, 0 <= share < 1.
    unit: what the share counts, "examples" or "tokens".
    """

    name: str
    rows: Sequence[TokenRow] | Callable[[], Iterable[TokenRow]]
    share: float
    unit: str = "examples"

    def stream(self, seed: int) -> Iterator[TokenRow]:
        """Rows without end."""
        turn = 0
        while True:
            rows = self.rows() if callable(self.rows) else _shuffled(self.rows, f"{seed}/{self.name}/{turn}")
            count = 0
            for row in rows:
                count += 1
                yield row
            if not count:
                raise PlanError(
                    f"Source {self.name!r} of the mix has no rows.", "Give it rows or set its share to 0."
                )
            turn += 1


@dataclass(frozen=True)
class Mix:
    """The task's rows, further sources, and maps over every row."""

    task: Sequence[TokenRow]
    sources: tuple[Source, ...] = ()
    maps: tuple[Map, ...] = ()

    def add(self, source: Source) -> Mix:
        if source.share == 0:
            return self
        whole = sum(s.share for s in self.sources) + source.share
        if not 0 <= source.share or whole >= 1:
            raise PlanError(
                f"The shares of the mix ({', '.join(f'{s.name} {s.share:g}' for s in (*self.sources, source))}) leave "
                "nothing for the task.",
                "Lower them so that they add up to less than 1.",
            )
        return replace(self, sources=(*self.sources, source))

    def map(self, function: Map) -> Mix:
        return replace(self, maps=(*self.maps, function))

    @property
    def task_share(self) -> float:
        return 1.0 - sum(s.share for s in self.sources)

    def num_rows(self, epochs: float) -> int:
        """Rows of a run in which every task row is seen `epochs` times (shares counted in examples)."""
        by_examples = 1 - sum(s.share for s in self.sources if s.unit == "examples")
        return max(1, round(len(self.task) * epochs / by_examples))

    def draw(self, seed: int) -> Iterator[TokenRow]:
        """Rows without end, in the order every host and every resumed run sees."""
        task = Source("task", self.task, self.task_share)
        streams = [(s, s.stream(seed)) for s in (task, *self.sources)]
        used = [0.0] * len(streams)
        total = {"examples": 0.0, "tokens": 0.0}
        while True:
            behind = [s.share * (total[s.unit] + 1) - u for (s, _), u in zip(streams, used, strict=True)]
            pick = max(range(1, len(streams)), key=lambda n: behind[n], default=0)
            pick = pick if pick and behind[pick] >= 0.5 else 0  # nobody half a row behind: the task's turn
            source, stream = streams[pick]
            row = next(stream)
            used[pick] += 1 if source.unit == "examples" else len(row.ids)
            total["examples"] += 1
            total["tokens"] += len(row.ids)
            for function in self.maps:
                row = function(row)
            yield row


def _shuffled(rows: Sequence[TokenRow], key: str) -> list[TokenRow]:
    out = list(rows)
    random.Random(key).shuffle(out)  # a string seed is hashed by sha512: the same on every machine
    return out
