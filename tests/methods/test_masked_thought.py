"""MaskedThought by hand: the rate over a run, what is read, what is predicted, the loss and its gradient."""

import numpy as np
import pytest
import torch

from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.methods import KLToBase, MaskedThought
from holdfast.services import Context, Look


@pytest.fixture
def ctx(tiny_model, tokenizer):
    return Context(tiny_model(), tokenizer, total_steps=100)


def read(method, rows, step, ctx):
    return method.batch(rows, step, Look(ctx, {}, lambda _rows: (None, None)))


def test_the_rate_rises_to_its_end():
    """0.4 * min(1, step / 66) of 100 steps: 0 at first, 0.2 after 33, 0.4 from 66 on."""
    method = MaskedThought()
    got = [method.rate(step, 100) for step in (0, 33, 66, 99)]
    assert got == pytest.approx([0, 0.2, 0.4, 0.4])
    assert MaskedThought(warmup=0.0).rate(0, 0) == 0.4
    with pytest.raises(PlanError, match="not known"):
        method.rate(5, 0)


def test_loss_and_gradient_by_hand(ctx, start, gradients):
    """At rate 1 with padding (id 2) the row 5 6 | 7 8 9 is read as 5 6 | 2 2 2, and 7 8 9 are predicted: 7 behind
    5 6, 8 behind 5 6 2, 9 behind 5 6 2 2. The loss is the mean of the three, by a plain forward of the model."""
    method = MaskedThought(max_rate=1.0, warmup=0.0, fill="pad")
    (row,) = read(method, [token_row([5, 6, 7, 8, 9], 2)], 0, ctx)
    assert row.ids.tolist() == [5, 6, 2, 2, 2] and row.predicted[2:].tolist() == [7, 8, 9]
    session = start([method], ctx.model)
    loss, grads = gradients(session, [row])
    logits = session.model(input_ids=torch.tensor([[5, 6, 2, 2]])).logits[0, 1:]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9]))
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    session.model.zero_grad()
    wanted.backward()
    for name, p in session.params.items():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-7)


def test_random_tokens_come_as_often_as_asked_and_anywhere(ctx):
    """2,000 targets at 0.4: 800 +- 3 * 21.9, less those where chance hit the right token (1 in 400)."""
    row = token_row(np.arange(2002) % 400, 2)
    (got,) = read(MaskedThought(warmup=0.0), [row], 3, ctx)
    changed = got.ids != row.ids
    assert abs(changed.sum() - 800) < 3 * 21.9 + 2 and not changed[:2].any()
    assert len(set(got.ids[changed])) > 250 and got.ids.max() < 400


def test_draws_depend_on_step_and_content_alone(ctx, tiny_model, tokenizer):
    a, b = token_row(range(5, 60), 5), token_row(range(9, 60), 5)
    method = MaskedThought(warmup=0.0)
    whole, alone = read(method, [a, b], 3, ctx), read(method, [b], 3, ctx)
    assert (whole[1].ids == alone[0].ids).all()
    assert (whole[1].ids != read(method, [b], 4, ctx)[0].ids).any()
    other = Context(tiny_model(), tokenizer, seed=1)
    assert (whole[1].ids != read(method, [b], 3, other)[0].ids).any()


def test_rows_of_other_sources_and_a_rate_of_0_stay(ctx):
    rows = [token_row(range(5, 60), 5), token_row(range(5, 60), 5, source="Replay")]
    assert read(MaskedThought(), rows, 0, ctx) is rows
    first, second = read(MaskedThought(warmup=0.0), rows, 0, ctx)
    assert second is rows[1] and (first.ids != rows[0].ids).any()


def test_the_teacher_reads_what_the_model_reads(ctx, start, gradients):
    """At the base weights the KL is 0 on corrupted rows too; the frozen base answers what it never saw."""
    method = MaskedThought(max_rate=1.0, warmup=0.0)
    row = token_row(range(5, 30), 5)
    session = start([method, KLToBase()], ctx.model, teacher_rows=[row])
    rows = read(method, [row], 0, ctx)
    assert session.loss(session.model, rows, {"task": 25}, 0)[1]["KLToBase"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.01)
    assert session.loss(session.model, rows, {"task": 25}, 0)[1]["KLToBase"] > 1e-6


@pytest.mark.parametrize("wrong", [{"max_rate": 1.5}, {"warmup": -0.1}, {"fill": "mask"}])
def test_wrong_settings_are_refused(wrong, ctx):
    with pytest.raises(PlanError, match=f"MaskedThought.{next(iter(wrong))}"):
        MaskedThought(**wrong).check(ctx)
