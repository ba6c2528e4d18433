"""A training that leaves no trace: afterwards the session is what it was before its first step, to the last bit.

What a run changes is what its checkpoint holds: the weights that train, the state of the methods, what they asked for
the next step, and which of them did something. All else is set up anew when the next training begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.session import Session
from holdfast.sites.steering import Steering


@contextmanager
def rewound(session: Session) -> Iterator[None]:
    """Undo what is trained inside, also where it ends in an error. The session has entered its one stage."""
    weights = {p: p.detach().clone() for p in session.params.values()}
    state = {m: {k: v.clone() for k, v in own.items()} for m, own in session.state.items()}
    effects, training = session.effects.copy(), session.model.training
    try:
        yield
    finally:
        for p, before in weights.items():
            p.data, p.grad = before, None  # not copied into: a broken-off step may have left another dtype
        for name, own in list(session.state.items()):
            own.clear()  # emptied, not replaced: others hold it
            own.update(state.get(name, {}))
        session.effects = effects
        session.steering = Steering(session.methods, session.state)
        session.model.train(training)
