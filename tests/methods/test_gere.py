"""GeRe: bands by hand, zero at the base, and hidden states of model and base."""

import pytest
import torch

from cases import run
from holdfast.data.tokens import tokenize
from holdfast.engine.forward import forward, forward_states
from holdfast.engine.ways import LAST, blocks
from holdfast.errors import PlanError
from holdfast.methods import GeRe
from holdfast.methods.loss.gere import _flags, _key, margin
from holdfast.services import Context, Teacher


def test_margins_by_hand():
    """lo = -1, hi = 1. Entries: low at h = -0.5: relu(-0.5 + 1) = 0.5;  high at 2: relu(1 - 2) = 0;
    neutral at 1.5: 0.5;  neutral at -3: 2;  neutral at 0.9: 0. Three of five are out: (0.5 + 0.5 + 2) / 3 = 1."""
    h = torch.tensor([[-0.5, 2.0, 1.5, -3.0, 0.9]], requires_grad=True)
    low, high = torch.tensor([[True, False, False, False, False]]), torch.tensor([[False, True, False, False, False]])
    value = margin(h, -torch.ones(5), torch.ones(5), low, high)
    assert value.item() == pytest.approx(1.0)
    value.sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[1 / 3, 0.0, 1 / 3, -1 / 3, 0.0]]))


@pytest.fixture
def ctx(tiny_model, tokenizer):
    return Context(tiny_model(), tokenizer, max_length=64, total_steps=8)


def test_nothing_is_out_at_the_base_and_moving_inside_a_band_costs_nothing(ctx):
    method = GeRe(pool=3)
    state, rows = method.prepare(ctx), method.asides(ctx)
    for row in rows:
        h = forward(ctx.model, [row], hidden=True)[1].float()
        low, high = (_flags(state[f"{name}/{_key(row)}"], h) for name in ("low", "high"))
        assert torch.equal(low, h <= state["lo"]) and torch.equal(high, h >= state["hi"])
        assert margin(h, state["lo"], state["hi"], low, high).abs().max() == 0
        inside = torch.where(low | high, h, (state["lo"] + state["hi"]) / 2)
        assert margin(inside, state["lo"], state["hi"], low, high).abs().max() == 0
        assert margin(h + 5, state["lo"], state["hi"], low, high).min() > 0
    assert 0.02 < low.float().mean() < 0.4 and 0.02 < high.float().mean() < 0.4  # about one sd on either side


@pytest.mark.parametrize("packing", [True, False])
def test_states_are_those_of_transformers(tiny_model, tokenizer, rows, packing):
    model = tiny_model()
    made = [tokenize(r, tokenizer, None) for r in rows[:3]]
    with torch.no_grad():
        packed, logits, states, _ = forward_states(model, made, (0, LAST), packing=packing)
        assert set(states) == {0, LAST} and len(blocks(model)) == 2
        plain = [model(torch.as_tensor(r.ids)[None], output_hidden_states=True) for r in made]
    for n, (row, out) in enumerate(zip(made, plain, strict=True)):
        at, mine = torch.as_tensor(row.scored.nonzero()[0]) - 1, torch.as_tensor(packed.row == n)
        torch.testing.assert_close(states[0][mine], out.hidden_states[1][0, at], atol=1e-5, rtol=0)
        torch.testing.assert_close(states[LAST][mine], out.hidden_states[-1][0, at], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[mine], out.logits[0, at], atol=1e-5, rtol=0)


def test_the_base_gives_its_states_for_known_and_for_new_rows(tiny_model, tokenizer, rows):
    import peft

    model, made = tiny_model(), [tokenize(r, tokenizer, None) for r in rows[:4]]
    wanted = {n: forward_states(model, made, (n,))[2][n] for n in (0, LAST)}
    teacher = Teacher(model, (0,))
    teacher.learn(model, made[:2])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    known = sum(r.num_scored for r in made[:2])
    for layer, states in wanted.items():
        torch.testing.assert_close(teacher.states(adapted, made[:2], layer), states[:known], atol=1e-5, rtol=0)
        assert teacher.num_forwards == 1 + (layer == LAST)
        torch.testing.assert_close(teacher.states(adapted, made[2:], layer), states[known:], atol=1e-5, rtol=0)


def test_the_states_move_less_than_without(tiny_model, tokenizer, rows):
    method = GeRe(pool=4, weight=20.0, replay=0.0)
    settings = {"steps": 10, "learning_rate": 3e-3}
    base = tiny_model()
    held, free = (
        run([method], tiny_model(), tokenizer, rows, **settings),
        run([], tiny_model(), tokenizer, rows, **settings),
    )
    made = method.asides(Context(base, tokenizer, max_length=512))
    with torch.no_grad():
        far = [
            (forward(r.model, made, hidden=True)[1] - forward(base, made, hidden=True)[1]).norm() for r in (held, free)
        ]
    assert far[0] < 0.8 * far[1]
    assert held.log.loss[0][1]["GeRe"] == 0.0 and held.log.loss[-1][1]["GeRe"] > 0


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"pool": 0}, {"max_tokens": 1}, {"rows_per_step": -1}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="GeRe"):
        GeRe(**wrong).check(None)
