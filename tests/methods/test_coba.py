"""CoBa: slopes and weights by hand, and where they come from in a run."""

import json
import math

import pytest
import torch

from cases import run, token_rows
from holdfast.data.mix import Mix
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods import CoBa, Replay
from holdfast.methods.steer.coba import balance, slopes
from holdfast.services import Context
from holdfast.sites.steering import Steering


def fp64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_slopes_by_hand():
    """Over x = -1, 0, 1 a line's slope is (y_3 - y_1) / 2."""
    assert slopes(fp64([[1.0, 0.8, 0.6], [1.0, 1.0, 1.3]])).tolist() == pytest.approx([-0.2, 0.15])


def test_weights_at_the_first_look_by_hand():
    """a = (-0.2, 0.1), nothing before: a / sum |a| = (-2/3, 1/3), times K = 2; RCS = softmax(-4/3, 2/3)
    = (1, e^2) / (1 + e^2). DF = 1 * softmax of one = 1, so ACS does not count. w = softmax(2 RCS), the two differ by
    2 (e^2 - 1) / (e^2 + 1) = 1.52319 before it: w_1 = 1 / (1 + e^1.52319) = 0.17899."""
    got = balance(fp64([[-0.2], [0.1]]), fp64([0.1]), 5.0)
    assert got.tolist() == pytest.approx([0.17899, 0.82101], abs=1e-5)


def test_weights_when_the_worst_source_gets_worse_by_hand():
    """a_1 = (-0.2, -0.1), a_2 = (-0.1, 0.1), a_max = (-0.1, 0.1), tau = 1.
    RCS: 2 * (-0.5, 0.5) = (-1, 1), softmax = (0.11920, 0.88080).
    ACS: -2 * -0.1 / 0.3 = 0.66667 and -2 * 0.1 / 0.2 = -1; softmax = (0.84113, 0.15887).
    DF: -2 * (-0.5, 0.5) = (1, -1); softmax of the last = 0.11920, times 2 = 0.23841.
    DF RCS + (1 - DF) ACS = (0.02842 + 0.64060, 0.20999 + 0.12099) = (0.66902, 0.33098); times 2, softmax:
    w_1 = 1 / (1 + e^-0.67607) = 0.66286."""
    got = balance(fp64([[-0.2, -0.1], [-0.1, 0.1]]), fp64([-0.1, 0.1]), 1.0)
    assert got.tolist() == pytest.approx([0.66286, 0.33714], abs=2e-5)


def test_weights_have_a_floor_and_no_order():
    """DF = 3 * softmax(-3, -3, 3)[2] = 2.98516 here: without the floor w_1 would be below 1 / 20.
    RCS = softmax(-1, 1) = (0.11920, 0.88080); ACS: -3 * -1 / 3 = 1 and -1, so (0.88080, 0.11920).
    The two differ by 2 (DF 0.76159 - (1 - DF) 0.76159) = 2 * 0.76159 * 4.97031 = 7.57070; w_1 = 1 / (1 + e^7.5707)
    = 0.00051, so 0.9 * 0.00051 + 0.05."""
    own, worst = fp64([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]), fp64([1.0, 1.0, -1.0])
    got = balance(own, worst, 3.0)
    assert got.tolist() == pytest.approx([0.05046, 0.94954], abs=1e-4)
    assert torch.equal(balance(own.flip(0), worst, 3.0), got.flip(0))
    assert balance(fp64([[0.0], [0.0], [0.0]]), fp64([0.0]), 5.0).tolist() == pytest.approx([1 / 3] * 3)


def ask(steering, step, **losses):
    return steering.ask(Past(step, 100, {}, 1e-3), {"CoBa": losses})


def test_losses_are_relative_to_the_first_and_weights_stay_between_two_looks():
    """Losses 4, 3.2 and 2, 2.2 are 1, 0.8 and 1, 1.1: slopes -0.2 and 0.1, the worst 0.1, as in the first example."""
    method = CoBa(warmup=2, every=2, tau=5.0)
    steering = Steering([method], {"CoBa": {}})
    ask(steering, 0, a=4.0, b=2.0)
    assert steering.source_weight == {}
    assert [s for s in range(5) if method.looks(s)] == [0, 2, 4]
    ask(steering, 1)
    assert steering.source_weight == {}
    ask(steering, 2, b=2.2, a=3.2)
    wanted = {"a": pytest.approx(2 * 0.17899, abs=1e-5), "b": pytest.approx(2 * 0.82101, abs=1e-5)}
    assert steering.source_weight == wanted
    ask(steering, 3)
    assert steering.source_weight == wanted


def test_a_token_of_the_mix_weighs_one_on_average():
    """The weights of the first example, 0.17899 and 0.82101; the first source has 3 of 4 tokens of the mix:
    sum part w = 0.75 * 0.17899 + 0.25 * 0.82101 = 0.33950, so 0.52722 and 2.41829."""
    steering = Steering([CoBa(warmup=1)], {"CoBa": {}})
    for step, losses in enumerate([{"a": 4.0, "b": 2.0}, {"a": 3.2, "b": 2.2}]):
        steering.ask(Past(step, 100, {}, 1e-3, parts={"a": 0.75, "b": 0.25}), {"CoBa": losses})
    assert steering.source_weight == {"a": pytest.approx(0.52722, abs=1e-4), "b": pytest.approx(2.41829, abs=1e-4)}


def test_a_window_forgets_what_is_older():
    method = CoBa(warmup=1, history=2)
    steering = Steering([method], {"CoBa": {}})
    for step, (a, b) in enumerate([(1.0, 1.0), (5.0, 0.5), (3.0, 0.4)]):
        ask(steering, step, a=a, b=b)
    assert steering.state["CoBa"]["slopes"][:, -1].tolist() == pytest.approx([-2.0, -0.1, -2.0])


def test_sources_of_other_methods_are_balanced(tiny_model, tokenizer, rows):
    plan = [Replay(share=0.3, max_tokens=32), CoBa(warmup=1, cut=0.25, every=2)]
    got = run(plan, tiny_model(), tokenizer, rows, 6)
    weights = got.session.steering.source_weight
    assert set(weights) == {"task", "Replay:instructions", "Replay:text"}
    parts = got.session.held_out.parts
    assert math.isclose(sum(parts[n] * w for n, w in weights.items()), 1)
    assert min(weights.values()) >= 0.1 * sum(weights.values()) / 3


def test_one_source_alone_and_a_run_too_short_are_refused(tiny_model, tokenizer, rows):
    with pytest.raises(PlanError, match="rows to look at of task alone"):
        run([CoBa(warmup=1)], tiny_model(), tokenizer, rows, 4)
    with pytest.raises(PlanError, match="in a run of 100 it never would"):
        CoBa().prepare(Context(None, None, total_steps=100))


@pytest.mark.parametrize("wrong", [{"warmup": 0}, {"history": 1}, {"tau": -1.0}, {"cut": 1.0}, {"share": 1.0}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="CoBa"):
        CoBa(**wrong).check(None)


def test_rows_that_are_looked_at_are_no_first_ones_and_own_text_is_cut(tiny_model, tokenizer, rows, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"The {n}th day was long. " * 20}) + "\n" for n in range(12)))
    ctx, method = (
        Context(tiny_model(), tokenizer, max_length=32),
        CoBa(share=0.5, cut=0.6, rows=3, sources=(str(path),)),
    )
    mix = method.data(Mix(token_rows(rows, tokenizer)), ctx)
    assert all(len(r.ids) <= 32 for r in mix.sources[0].rows)
    held, found = mix.held_out(), method.held_out(mix, ctx)
    assert all(len(found[n]) == 3 < len(held[n]) for n in held)
    assert any([r.key for r in found[n]] != [r.key for r in held[n][:3]] for n in held)
