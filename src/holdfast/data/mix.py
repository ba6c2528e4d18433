"""The training mix: the task's rows and what methods add, drawn in one fixed order.

Shares are exact by construction: after every row each source, the task too, is within one row (or one row's tokens) of
its share. The order depends on the seed alone, so a resumed run needs no iterator state. Filters and the order look at
the task's rows as they came, before any map, and at no row of another source.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError, suggest

Map = Callable[[TokenRow], TokenRow]
Keeps = Callable[[TokenRow], bool]
# (rows, seed, round from 0) -> as many indices into rows; the n-th row of round r is the (r * len(rows) + n)-th drawn
Order = Callable[[Sequence[TokenRow], int, int], Sequence[int]]


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
    order: Order | None = None  # of a sequence, in place of chance

    def stream(self, seed: int) -> Iterator[TokenRow]:
        """Rows without end."""
        turn = 0
        while True:
            rows = self._round(seed, turn)
            count = 0
            for row in rows:
                count += 1
                yield row
            if not count:
                raise PlanError(f"Source {self.name!r} of the mix has no rows.", "Give it rows or set its share to 0.")
            turn += 1

    def _round(self, seed: int, turn: int) -> Iterable[TokenRow]:
        if callable(self.rows):
            return self.rows()
        if self.order:
            return [self.rows[i] for i in self.order(self.rows, seed, turn)]
        return _shuffled(self.rows, f"{seed}/{self.name}/{turn}")


@dataclass(frozen=True)
class Mix:
    """The task's rows, further sources, maps over every row, and filters and an order of the task's rows.

    held: part of the rows that never trains (`hold_out`). without: names of sources that are not drawn from (`only`).
    """

    task: Sequence[TokenRow]
    sources: tuple[Source, ...] = ()
    maps: tuple[Map, ...] = ()
    filters: tuple[tuple[str, Keeps], ...] = ()
    order: Order | None = None
    held: float = 0.0
    without: frozenset[str] = frozenset()

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

    def with_filter(self, name: str, keeps: Keeps) -> Mix:
        """A row of the task stays when every filter keeps it; `name` is that of the method."""
        return replace(self, filters=(*self.filters, (name, keeps)))

    def with_order(self, order: Order) -> Mix:
        """Rows of the task in this order instead of shuffled rounds; a method that does so `writes` "order"."""
        assert self.order is None, "the planner lets one method decide the order"
        return replace(self, order=order)

    @cached_property
    def _verdicts(self) -> dict[str, list[bool]]:
        """Whether each method's filters keep each row of the task."""
        found: dict[str, list[bool]] = {}
        for name, keeps in self.filters:
            before = found.get(name, [True] * len(self.task))
            found[name] = [stays and bool(keeps(r)) for stays, r in zip(before, self.task, strict=True)]
        return found

    @cached_property
    def kept(self) -> Sequence[TokenRow]:
        """The rows of the task that all filters keep.

        Raises:
            PlanError: there are none.
        """
        stays = [all(v[n] for v in self._verdicts.values()) for n in range(len(self.task))]
        rows = [r for r, stay in zip(self.task, stays, strict=True) if stay]
        if self.filters and not rows:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in self.left_out.items())
            raise PlanError(
                f"No row of the task is left: of {len(self.task)} rows the filters leave out {shares}.",
                "Make them milder, or take one of them out of the plan.",
            )
        return rows if self.filters else self.task

    @property
    def left_out(self) -> dict[str, float]:
        """The share of the task's rows that each method alone leaves out, by its name."""
        return {name: 1 - sum(v) / max(1, len(v)) for name, v in self._verdicts.items()}

    def hold_out(self, share: float) -> Mix:
        """Keep about `share` of the rows out of training, chosen by content; of several wishes the largest counts.

        Equal rows are on one side, and a smaller part lies inside of a larger one. Streamed sources are left whole.
        """
        return replace(self, held=max(self.held, share))

    def held_out(self) -> dict[str, list[TokenRow]]:
        """The rows that never train, each once, with the maps of the mix, by the label of their source."""
        found: dict[str, dict[bytes, TokenRow]] = {}
        for rows in (self.kept, *(s.rows for s in self.sources if not callable(s.rows))):
            for row in (r for r in rows if is_held(r, self.held)):
                found.setdefault(row.source, {}).setdefault(row.key, row)
        return {source: [self.mapped(r) for r in rows.values()] for source, rows in found.items()}

    def only(self, names: Sequence[str] | None, without: Sequence[str] = ()) -> Mix:
        """The mix drawn from some of its sources ("task" is one), whose shares keep their proportions; None: all.

        Those in `without` are left out.

        Raises:
            PlanError: no source has one of these names.
        """
        if names is None and not without:
            return self
        known = ["task", *(s.name for s in self.sources)]
        for name in (*(names or ()), *without):
            if name not in known:
                what = f"A stage of the plan draws from {name!r}, which is no source of the mix."
                raise PlanError(what, suggest(name, known) or f"Known: {', '.join(known)}.")
        return replace(self, without=frozenset(known) - (set(names or known) - set(without)))

    def mapped(self, row: TokenRow) -> TokenRow:
        """A drawn row as it is trained on: with the maps so far."""
        for function in self.maps:
            row = function(row)
        return row

    @property
    def trained(self) -> Sequence[TokenRow]:
        """The rows of the task that train: kept by all filters so far, and not held out so far."""
        return self._trains(self.kept)

    def _trains(self, rows: Sequence[TokenRow]) -> Sequence[TokenRow]:
        return [r for r in rows if not is_held(r, self.held)] if self.held else rows

    def _drawn(self) -> list[Source]:
        """The sources that are drawn from, the first of which takes what the others leave."""
        every = [Source("task", self.kept, self.task_share, order=self.order), *self.sources]
        every = [s if callable(s.rows) else replace(s, rows=self._trains(s.rows)) for s in every]
        if not self.without:
            return every
        kept = [s for s in every if s.name not in self.without]
        return [replace(s, share=s.share / sum(k.share for k in kept)) for s in kept]

    @property
    def task_share(self) -> float:
        return 1.0 - sum(s.share for s in self.sources)

    def num_rows(self, epochs: float) -> int:
        """Rows of a run in which every task row that stays is seen `epochs` times (shares counted in examples)."""
        by_examples = 1 - sum(s.share for s in self.sources if s.unit == "examples")
        return max(1, round(len(self.trained) * epochs / by_examples))

    def parts(self) -> dict[str, float]:
        """Label of a source -> the part of the task's scored positions that its rows bring on average.

        {} where a source is streamed, so that nobody knows its rows yet, or has none.
        """
        drawn = self._drawn()
        sizes = [0 if callable(s.rows) else len(s.rows) for s in drawn]
        if not all(sizes):
            return {}
        counted = [self._counted(islice(s.stream(0), n)) for s, n in zip(drawn, sizes, strict=True)]
        rates = _rates(drawn, [tokens / n for (tokens, _), n in zip(counted, sizes, strict=True)])
        found = Counter[str]()
        for rate, (_, scored), n in zip(rates, counted, sizes, strict=True):
            found.update({label: rate * count / n for label, count in scored.items()})
        whole = sum(found.values())
        return {label: part / whole for label, part in found.items()} if whole else {}

    def _counted(self, rows: Iterable[TokenRow]) -> tuple[int, Counter[str]]:
        """Tokens of some rows as they are drawn, and the task's scored positions in them, by label."""
        tokens, scored = 0, Counter[str]()
        for row in rows:
            tokens, made = tokens + len(row.ids), self.mapped(row)
            scored[made.source] += made.num_scored if made.owner == "task" else 0
        return tokens, scored

    def draw(self, seed: int) -> Iterator[TokenRow]:
        """Rows without end, in the order every host and every resumed run sees."""
        sources = self._drawn()
        streams = [(s, s.stream(seed)) for s in sources]
        used = [0.0] * len(streams)
        total = {"examples": 0.0, "tokens": 0.0}
        while True:
            pick = _turn(sources, used, total)
            source, stream = streams[pick]
            row = next(stream)
            used[pick] += 1 if source.unit == "examples" else len(row.ids)
            total["examples"] += 1
            total["tokens"] += len(row.ids)
            yield self.mapped(row)


def names_of(rows: Sequence[TokenRow]) -> list[str]:
    """Where each row comes from; rows on disk tell it without being read."""
    return list(getattr(rows, "sources", None) or (row.source for row in rows))


def is_held(row: TokenRow, share: float) -> bool:
    """Whether a row is among the `share` that content decides: the same on every machine, in any order of rows."""
    return share > 0 and int.from_bytes(hashlib.sha256(row.key).digest()[:8], "big") < share * 2**64


def _rates(sources: Sequence[Source], length: Sequence[float]) -> list[float]:
    """How many of the rows drawn are each source's, as `_turn` draws them; length: mean tokens of a row of each.

    A source by examples has its share of the rows; one by tokens has share * tokens of an average row / its length;
    sources[0] has what is left, from which the tokens of an average row follow.
    """
    others = list(zip(sources, length, strict=True))[1:]
    rows = sum(s.share for s, _ in others if s.unit == "examples")
    tokens = sum(n * s.share for s, n in others if s.unit == "examples") + length[0] * (1 - rows)
    by_tokens = [(s.share, n) for s, n in others if s.unit == "tokens"]
    average = tokens / (1 - sum(p for p, _ in by_tokens) + length[0] * sum(p / n for p, n in by_tokens))
    rates = [s.share if s.unit == "examples" else s.share * average / n for s, n in others]
    return [max(0.0, 1 - sum(rates)), *rates]


def _turn(sources: Sequence[Source], used: Sequence[float], total: dict[str, float]) -> int:
    """Whose row comes next; sources[0] is the task and takes what the others leave.

    Shares of tokens: whoever is furthest behind, if anybody is. Shares of examples: Tijdeman's rule (The chairman
    assignment problem, 1980), the earliest deadline among those at least 1 / (2k - 2) rows behind, which keeps each of
    k sources within 1 - 1 / (2k - 2) rows of its share; the largest deficit alone can miss by more than one row.
    """
    late = {i: s.share * (total["tokens"] + 1) - used[i] for i, s in enumerate(sources) if s.unit == "tokens"}
    if late and max(late.values()) >= 0.5:
        return max(late, key=lambda i: late[i])
    share = {i: s.share for i, s in enumerate(sources) if i and s.unit == "examples"}
    behind = {i: s * (total["examples"] + 1) - used[i] for i, s in share.items()}
    behind[0], share[0] = 1 - sum(behind.values()), 1 - sum(share.values())
    edge = 1 / max(1, 2 * len(behind) - 2)
    ready = [i for i in behind if behind[i] >= edge - 1e-9]
    return min(ready, key=lambda i: (1 - edge - behind[i]) / share[i])


def _shuffled(rows: Sequence[TokenRow], key: str) -> Iterator[TokenRow]:
    order = list(range(len(rows)))
    random.Random(key).shuffle(order)  # a string seed is hashed by sha512: the same on every machine
    return (rows[n] for n in order)  # one at a time: they may lie on disk
