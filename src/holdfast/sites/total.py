"""The loss of a micro-batch: weights of tokens multiply, terms of methods add.

Both are sums over positions, so they can be computed for a piece of the positions at a time. Where logits would be
many, the model gives the states before its head; head, weights and terms run piece by piece, again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from holdfast.engine import head
from holdfast.engine.counts import Counts, count_of
from holdfast.engine.forward import forward_states
from holdfast.engine.layout import upload
from holdfast.engine.pack import WEIGHT, Packed, TokenRow
from holdfast.engine.processes import is_whole
from holdfast.engine.replaced import Handed
from holdfast.engine.shards import whole
from holdfast.engine.ways import LAST, States, inner
from holdfast.errors import NoEffect
from holdfast.method import Method, Term
from holdfast.sites.scale import divided

Parts = dict[str, torch.Tensor]


@dataclass
class Seen:
    """One forward, or a piece of its positions.

    first: whether what counts once counts here: penalties on weights; again: the same is computed for a second time,
    in the backward; asked: answers of the base that the pieces of a forward share.
    """

    packed: Packed
    logits: torch.Tensor
    states: States
    handed: Handed
    first: bool = True
    again: bool = False
    asked: dict[Any, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What the micro-batches of a step are computed with. share: this one's part of a penalty; number: from 0."""

    model: Any
    counts: Counts
    number: int
    share: float


class Total:
    """The loss under a plan at work.

    Args:
        session: whose methods, state and steering it is.
    """

    def __init__(self, session: Any):
        self.session = session
        self._once: set[str] = set()  # methods whose term is a penalty

    def loss(self, step: Step, rows: Sequence[TokenRow]) -> tuple[torch.Tensor, Parts]:
        """(loss of a micro-batch, its parts without gradient)."""
        session = self.session
        if self._comes_in_pieces(step.model, rows):
            return self._by_pieces(step, rows)
        packed, logits, states, handed = forward_states(step.model, rows, session.layers, packing=session.packing)
        return self._of(step, Seen(packed, logits, states, handed))

    def _of(self, step: Step, seen: Seen) -> tuple[torch.Tensor, Parts]:
        """The same of one forward, or of a piece of it."""
        session = self.session
        views = {m.name: session.view(m, step, seen) for m in session.methods}
        total = self._of_task(step, seen, views)
        parts = {"task": total.detach()}
        for m in session.methods:
            found = m.loss(views[m.name]) if seen.first or m.name not in self._once else None
            terms = () if found is None else found if isinstance(found, tuple) else (found,)
            if isinstance(found, Term) and found.owner is None:
                self._once.add(m.name)
            values = [self._scaled(m, t, step, seen) for t in terms if seen.first or t.owner is not None]
            if values:
                session.effects[m.name] += not seen.again
                value = torch.stack(values).sum()
                total = total + value
                parts[m.name] = value.detach()
                parts |= {f"{m.name}/{name}": x for t in terms for name, x in _shown(t, step, seen)}
        return total, parts

    def _scaled(self, method: Method, term: Term, step: Step, seen: Seen) -> torch.Tensor:
        """This forward's part of a term."""
        if term.owner is None:
            value = whole(term.value) * step.share
        else:
            value = divided(term, seen.packed, step.counts)
        self._must_carry(method, value)
        return value

    def _of_task(self, step: Step, seen: Seen, views: Mapping[str, Any]) -> torch.Tensor:
        session = self.session
        view = next(iter(views.values()), None) or session.view(None, step, seen)
        at = view.positions("task")
        token_loss = -view.token_logp[at]
        if any(WEIGHT in r.numbers for r in seen.packed.rows):  # the data's own; the count stays that of targets
            token_loss = token_loss * view.number(WEIGHT)[at]
        for m in session.methods:
            weight = m.token_weight(views[m.name])
            if weight is not None:
                session.effects[m.name] += not seen.again
                token_loss = token_loss * weight.detach()[at]
        if session.steering.source_weight:
            token_loss = token_loss * self._source_weights(seen.packed, at)
        count = max(1, count_of(step.counts, "task"))
        if session.steering.methods and not seen.again:
            sources = [seen.packed.rows[i].source for i in seen.packed.row[at.cpu().numpy()]]
            session.steering.note(sources, token_loss / count)
        return token_loss.sum() / count

    def _source_weights(self, packed: Packed, at: torch.Tensor) -> torch.Tensor:
        """(M,) weights that steering gives the sources of the task's positions."""
        weight = self.session.steering.source_weight
        of = np.asarray([weight.get(r.source, 1.0) for r in packed.rows], dtype=np.float32)
        return upload(of[packed.row], at.device)[at]

    def _must_carry(self, method: Method, value: torch.Tensor) -> None:
        if not value.requires_grad and torch.is_grad_enabled() and not self.session.steering.held:
            raise NoEffect(
                f"{method.name} adds a term to the loss that carries no gradient, so it cannot change anything.",
                "This is a fault of the method: compute the term from view.logits or view.params.",
            )

    # ---- by pieces

    def _comes_in_pieces(self, model: Any, rows: Sequence[TokenRow]) -> bool:
        """Whether logits would be many, and may be computed outside of the model's own forward."""
        if sum(r.num_scored for r in rows) * vocabulary(model) <= 2 * head.PIECE:
            return False
        alone = not any("rollouts" in m.sites() for m in self.session.methods)
        if not (alone and is_whole(model)) or (is_wrapped(model) and head_trains(model)):
            return False  # DDP must see every use of a weight inside of its forward
        return head.comes_apart(model)

    def _splits(self, rows: Sequence[TokenRow]) -> bool:
        """Whether a long row may be cut: not where a method reads whole rows, or asks the base about new ones."""
        session = self.session
        if any(m.whole_rows for m in session.methods):
            return False
        asking = [m.name for m in session.methods if {"base_logits", "base_hidden"} & m.needs]
        owners = {name if name in session.asides else "task" for name in asking}
        return session.teacher is None or session.teacher.knows([r for r in rows if r.owner in owners])

    def _by_pieces(self, step: Step, rows: Sequence[TokenRow]) -> tuple[torch.Tensor, Parts]:
        session = self.session
        packed, states, handed = head.forward_bare(step.model, rows, session.layers, packing=session.packing)
        most, asked = max(1, head.PIECE // vocabulary(step.model)), dict[Any, torch.Tensor]()
        total, parts = torch.zeros((), device=packed.target.device), dict[str, torch.Tensor]()
        for n, (at, piece) in enumerate(head.pieces(packed, most, self._splits(rows))):
            own = {layer: s[at] for layer, s in states.items()}
            ran: list[Sequence[str]] = []

            def run(last: torch.Tensor, n: int = n, piece: Packed = piece, own: States = own, ran: Any = ran) -> Any:
                logits = head.head_of(step.model)(last)
                seen = Seen(piece, logits, own, handed, first=n == 0, again=bool(ran), asked=asked)
                found, of = self._of(step, seen)
                ran.append(list(of))
                return found, *of.values()

            found, *values = checkpoint(run, own[LAST], use_reentrant=False)
            total = total + found
            for name, value in zip(ran[0], values, strict=True):
                parts[name] = parts[name] + value if name in parts else value
        return total, parts


def _shown(term: Term, step: Step, seen: Seen) -> Iterator[tuple[str, torch.Tensor]]:
    """This forward's part of what a term shows beside its value."""
    for name, x in term.shown.items():
        yield name, divided(replace(term, value=x.detach()), seen.packed, step.counts)


def vocabulary(model: Any) -> int:
    return int(inner(model).config.get_text_config().vocab_size)


def is_wrapped(model: Any) -> bool:
    return hasattr(model, "module")


def head_trains(model: Any) -> bool:
    return any(p.requires_grad for p in head.head_of(model).parameters())
