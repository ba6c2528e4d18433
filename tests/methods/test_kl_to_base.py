"""KLToBase: both directions by hand, and the properties of learning without forgetting."""

import math

import pytest
import torch

from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.methods import KLToBase, LoRA
from holdfast.services import Context

TUNED, BASE = [[0.8, 0.1, 0.1]], [[0.5, 0.25, 0.25]]


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        # KL(base || tuned) = 0.5 ln(0.5/0.8) + 0.5 ln(0.25/0.1) = 0.5 ln(0.625 * 2.5) = 0.5 ln 1.5625 = ln 1.25
        ("forward", math.log(1.25)),
        # KL(tuned || base) = 0.8 ln(0.8/0.5) + 0.2 ln(0.1/0.25) = 0.8 ln 1.6 + 0.2 ln 0.4 = 0.37600 - 0.18326
        ("reverse", 0.192745),
    ],
)
def test_hand_values(toy_view, direction, expected):
    view = toy_view(torch.tensor(TUNED).log(), [0], base=BASE)
    term = KLToBase(weight=1.0, direction=direction).loss(view)
    assert term.owner == "task"
    assert term.value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_constant_on_all_logits_changes_nothing(toy_view, direction):
    values = [
        KLToBase(direction=direction).loss(toy_view(torch.tensor(TUNED).log() + c, [0], base=BASE)).value.item()
        for c in (0.0, 7.0)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_never_negative_and_flat_where_the_two_agree(toy_view, direction):
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 3, generator=draw).softmax(-1) for _ in range(2))
    method = KLToBase(direction=direction)
    assert (method.loss(toy_view(p.log(), [0] * 50, base=q.tolist())).value > -1e-7).all()
    logits = p.log().requires_grad_()
    value = method.loss(toy_view(logits, [0] * 50, base=p.tolist())).value.sum()
    value.backward()
    assert abs(value.item()) < 1e-5
    assert logits.grad.abs().max() < 1e-6


def moved(session):
    with torch.no_grad():
        for p in session.params.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return session


def test_doubling_the_weight_doubles_its_gradient(tiny_model, start, token_rows, gradients):
    made = {}
    for weight in (0.0, 0.5, 1.0):
        methods = [KLToBase(weight=weight)]
        made[weight] = gradients(moved(start(methods, tiny_model(), teacher_rows=token_rows)), token_rows)[1]
    for name, plain in made[0.0].items():
        once, twice = made[0.5][name] - plain, made[1.0][name] - plain
        torch.testing.assert_close(twice, 2 * once, atol=1e-6, rtol=1e-3)
    assert max((made[0.5][n] - made[0.0][n]).abs().max() for n in made[0.0]) > 1e-4


def test_lora_at_its_start_steps_like_the_plain_run(tiny_model, start, token_rows, gradients):
    one = gradients(start([LoRA(r=2), KLToBase(weight=5.0)], tiny_model(), teacher_rows=token_rows), token_rows)
    two = gradients(start([LoRA(r=2)], tiny_model()), token_rows)
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    for name in two[1]:
        torch.testing.assert_close(one[1][name], two[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tied", "methods"),
    [
        (True, []),
        (False, []),
        (True, [LoRA(r=2)]),
        (False, [LoRA(r=2)]),
        (False, [LoRA(r=2, target_modules=("q_proj", "lm_head"))]),
    ],
)
def test_the_teacher_stays_the_base(tiny_model, start, token_rows, tied, methods):
    """Stored answers and the adapter-off path both give the untouched base, whatever trains, the head included."""
    base = forward(tiny_model(tied), token_rows)[1].log_softmax(-1).detach()
    session = moved(start([*methods, KLToBase()], tiny_model(tied), teacher_rows=token_rows[:2]))
    known = session.teacher.logp(session.model, token_rows[:2])
    torch.testing.assert_close(known, base[: len(known)], atol=1e-5, rtol=0)
    if methods:
        torch.testing.assert_close(session.teacher.logp(session.model, token_rows), base, atol=1e-5, rtol=0)
    tuned = forward(session.model, token_rows)[1].log_softmax(-1)
    assert (tuned - base).abs().max() > 1e-2  # the model itself did move


def test_replay_compares_its_own_rows_only(tiny_model, start, token_rows, toy_view):
    method = KLToBase(on="replay", rows_per_step=2, max_tokens=12)
    session = start([method], tiny_model())
    pool = session.asides["KLToBase"]
    assert len(pool) > 10
    assert {r.owner for r in pool} == {"KLToBase"}
    assert max(len(r.ids) for r in pool) == 12
    assert all(r.num_scored == len(r.ids) - 1 for r in pool)  # all tokens
    assert method.asides_at(0, 5, 9) == [0, 1]
    assert method.asides_at(2, 5, 9) == [4, 0]  # goes round
    view = toy_view(torch.tensor(TUNED).log(), [0], base=BASE, owner="KLToBase")
    assert method.loss(view).owner == "KLToBase"
    assert KLToBase(on="task").loss(view) is None  # no task token in sight


@pytest.mark.parametrize("wrong", [{"direction": "sideways"}, {"on": "moon"}, {"weight": -1.0}])
def test_values_that_make_no_sense(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=f"KLToBase.{next(iter(wrong))}"):
        KLToBase(**wrong).check(Context(tiny_model(), tokenizer))
