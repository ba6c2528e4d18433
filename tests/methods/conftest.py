"""Pieces the method tests share: a view over given logits, and a session at work on a tiny model."""

import pytest
import torch

from holdfast.engine.counts import count_rows
from holdfast.engine.pack import pack, token_row
from holdfast.plan import Plan
from holdfast.services import Context, View
from holdfast.session import Session


class Given:
    """A teacher whose answers are written down, so that a divergence can be checked by hand."""

    def __init__(self, answers: torch.Tensor):
        self.answers = answers

    def logp(self, model, rows, asked=None):
        return self.answers if rows else self.answers[:0]


@pytest.fixture
def toy_view():
    """toy_view(logits (N, V), targets, base=(N, V) probabilities) is what a method sees of N positions."""

    def make(logits, targets, *, base=None, owner="task", step=0, params=None, base_weights=None, model=None):
        packed = pack([token_row([0, *targets], 1, owner)])
        teacher = None if base is None else Given(torch.tensor(base).log())
        counts = count_rows(packed.rows)
        return View(
            packed, logits, step, model, {}, teacher, owner, params or {}, base_weights or {}, {}, counts=counts
        )

    return make


@pytest.fixture
def start(tokenizer):
    """start(methods, model, rows=...) prepares a plan on a model and enters its first stage; returns the session."""

    def make(methods, model, *, rows=(), teacher_rows=(), enter=True, seed=0, max_length=1024):
        plan = Plan(methods)
        ctx = Context(model, tokenizer, seed=seed, rows=rows, max_length=max_length)
        session = Session(plan, model, ctx, knows_rows=True)
        session.prepare(teacher_rows)
        if enter:
            session.enter(session.stages[0])
        return session

    return make


@pytest.fixture
def token_rows():
    """Four short task rows of random tokens; the last half of each is scored."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in (9, 4, 14, 6)]
    return [token_row(i, len(i) // 2) for i in ids]


@pytest.fixture
def gradients():
    """gradients(session, rows, step=0) -> (loss, {name: gradient}) of one whole step."""

    def run(session, rows, step=0):
        loss, _ = session.loss(session.model, rows, count_rows(rows), step)
        for p in session.params.values():
            p.grad = None
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in session.params.items() if p.grad is not None}

    return run
