"""The loss in pieces: head, weights and terms on a part of the positions at a time; all must come out the same."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CASES, cases_that_stand, start
from holdfast import methods as hf
from holdfast.engine import head
from holdfast.engine.counts import count_rows
from holdfast.engine.forward import forward, forward_states
from holdfast.engine.pack import pack, token_row
from holdfast.engine.ways import LAST, inner
from holdfast.hosts.plain import Training
from holdfast.plan import Plan
from holdfast.sites import total

FEW = 3  # positions at a time
# what answers in training never comes in pieces (`Total._comes_in_pieces`)
PARTED = [c for c in CASES if "rollouts" not in c.method.sites()]


@pytest.fixture
def step(tiny_model, tokenizer, rows):
    """step(methods, dtype=...) -> (session, rows of its first step)."""

    def make(methods, dtype=torch.float32):
        plan = Plan(methods)
        session, mix = start(plan, tiny_model().to(dtype), tokenizer, rows, Training(20, 8, seed=0))
        session.enter(session.stages[-1])
        order = mix.draw(0)
        drawn = session.pick([next(order) for _ in range(8)], 0)
        return session, [*drawn, *session.rows_of(0)]

    return make


def result(session, rows, most, monkeypatch):
    """(loss, parts, gradients, effects) with so many positions at a time."""
    monkeypatch.setattr(head, "PIECE", most * total.vocabulary(session.model))
    before = session.effects.copy()
    session.model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss, parts = session.loss(session.model, rows, count_rows(rows), 0, 0.5)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in session.params.items() if p.grad is not None}
    effects, session.effects = session.effects - before, before
    return loss.item(), {n: v.item() for n, v in parts.items()}, grads, effects


@pytest.mark.parametrize("case", cases_that_stand(PARTED))
def test_pieces_give_the_same_loss_parts_and_gradients(case, step, monkeypatch):
    session, rows = step([case.method])
    assert sum(r.num_scored for r in rows) > 2 * FEW
    called = Counter()
    pieces = head.pieces
    monkeypatch.setattr(head, "pieces", lambda *a: called.update(pieces=len(out := pieces(*a))) or out)
    loss, parts, grads, effects = result(session, rows, 10**6, monkeypatch)
    assert not called
    again, parts_again, grads_again, effects_again = result(session, rows, FEW, monkeypatch)
    assert called["pieces"] > 1
    assert again == pytest.approx(loss, rel=1e-5) and parts_again == pytest.approx(parts, rel=1e-4, abs=1e-6)
    assert grads.keys() == grads_again.keys() and effects.keys() == effects_again.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-4, atol=1e-6)


def test_what_a_term_shows_comes_out_the_same_in_pieces(step, monkeypatch):
    session, rows = step([hf.ICLAnchor(every=1, short=0, shots=(1, 2), pool=8, hold=0.1, weight=3.0)])
    with torch.no_grad():
        for p in session.params.values():
            p.mul_(1.3)
    whole, parts = (result(session, rows, most, monkeypatch)[1] for most in (10**6, FEW))
    assert parts == pytest.approx(whole, rel=1e-4) and parts["ICLAnchor/weight"] == pytest.approx(3)
    assert parts["ICLAnchor/kl"] > 1e-3


class Largest(TorchDispatchMode):
    """The most positions that any tensor over the vocabulary had; (width, vocabulary) is the head's weight, turned."""

    def __init__(self, model):
        super().__init__()
        self.vocabulary, self.width, self.most = total.vocabulary(model), model.config.hidden_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.ndim > 1 and one.shape[-1] == self.vocabulary:
                if one.shape[-2] != self.width:
                    self.most = max(self.most, one.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize(
    "methods", [[], [hf.LoRA(r=4), hf.ICLAnchor(every=1, shots=(1, 2), pool=8)], [hf.KLToBase()]], ids=repr
)
def test_logits_never_exist_whole(methods, step, monkeypatch):
    """Head, weights, divergences and the teacher's own logits: no tensor of more positions than a piece has."""
    session, rows = step(methods)
    scored = sum(r.num_scored for r in rows)
    longest = max(r.num_scored for r in rows)
    for most, bound in ((10**6, scored), (FEW, max(FEW, longest))):
        with Largest(inner(session.model)) as seen:
            result(session, rows, most, monkeypatch)
        assert seen.most == scored if most > scored else seen.most <= bound < scored


def test_a_long_row_is_cut_where_nobody_reads_it_whole():
    rows = [token_row(range(1, 30), 4), token_row(range(1, 8), 3)]  # 25 and 4 positions
    packed = pack(rows)
    cut = head.pieces(packed, 10, splits=True)
    assert [s.stop - s.start for s, _ in cut] == [10, 10, 9]
    assert [[r.num_scored for r in p.rows] for _, p in cut] == [[10], [10], [5, 4]]
    assert all(p.rows[0].whole is rows[0] for _, p in cut) and cut[2][1].rows[1] is rows[1]
    assert torch.equal(torch.cat([p.target for _, p in cut]), packed.target)
    assert cut[2][1].row.tolist() == [0] * 5 + [1] * 4
    whole = head.pieces(packed, 10, splits=False)
    assert [s.stop - s.start for s, _ in whole] == [25, 4]


def test_the_base_answers_about_parts_of_rows_it_knows(step):
    session, rows = step([hf.KLToBase(on="task")])
    row = next(r for r in rows if r.num_scored > 1)
    _, piece = head.pieces(pack([row]), 1, splits=True)[1]
    known, part = session.teacher.logp(session.model, [row]), session.teacher.logp(session.model, piece.rows)
    torch.testing.assert_close(part, known[1:2])


@pytest.fixture
def token_rows():
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in (9, 4, 14, 6)]
    return [token_row(i, len(i) // 2) for i in ids]


@pytest.mark.parametrize("packing", [True, False])
def test_states_without_the_head_are_those_with_it(packing, tiny_model, token_rows):
    model = tiny_model()
    _, states, _ = head.forward_bare(model, token_rows, (0,), packing=packing)
    _, logits, wanted, _ = forward_states(model, token_rows, (0, LAST), packing=packing)
    assert all(torch.equal(states[n], wanted[n]) for n in (0, LAST))
    torch.testing.assert_close(head.head_of(model)(states[LAST]), logits)
    assert torch.equal(forward(model, token_rows, packing=packing)[1], logits)  # the head is in its place again
