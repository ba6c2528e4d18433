"""FINCH: the factor of a step, by hand, and what steering does to a run."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.method import Past, Steer
from holdfast.methods import FINCH
from holdfast.sites.steering import Steering


def past(step, loss):
    return Past(step, 10, {"task": loss}, 1e-3)


def test_factors_by_hand():
    """first 2, losses 4, 2, 3, 0.5: references 4, then (4 + 2) / 2 = 3, which stays.
    Factors: sqrt(4 / 4) = 1, sqrt(3 / 2) = 1.2247, sqrt(3 / 3) = 1, sqrt(3 / 0.5) = 2.449 capped at 2."""
    method = FINCH(first=2, most=2.0)
    steering = Steering([method], {"FINCH": method.prepare(None)})
    factors = []
    for step, loss in enumerate((4.0, 2.0, 3.0, 0.5)):
        steering.ask(past(step, loss))
        factors.append(steering.lr_factor)
    assert factors == pytest.approx([1.0, 1.5**0.5, 1.0, 2.0])


def test_power_one_halves_the_step_at_twice_the_loss():
    method = FINCH(first=1, power=1.0)
    steering = Steering([method], {"FINCH": method.prepare(None)})
    steering.ask(past(0, 2.0))
    steering.ask(past(1, 4.0))
    assert steering.lr_factor == pytest.approx(0.5)


def test_the_optimizer_takes_the_scaled_step_and_the_schedule_goes_on():
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    steering = Steering([], {})
    steering.lr_factor = 0.5
    steering.scale(optimizer)
    p.grad = torch.ones(1)
    optimizer.step()
    steering.unscale()
    assert p.item() == pytest.approx(0.95) and optimizer.param_groups[0]["lr"] == 0.1


class Asks(FINCH):
    """Answers with what the test says."""

    said = Steer()

    def steer(self, past, state):
        return type(self).said


class AsksToo(Asks):
    pass


def test_factors_multiply_sources_too_and_an_end_by_one_ends_all(monkeypatch):
    monkeypatch.setattr(Asks, "said", Steer(lr_factor=0.5, source_weight={"a": 2.0}))
    monkeypatch.setattr(AsksToo, "said", Steer(lr_factor=0.5, source_weight={"a": 3.0, "b": 0.0}, end="enough"))
    steering = Steering([Asks(), AsksToo()], {"Asks": {}, "AsksToo": {}})
    assert steering.ask(past(0, 1.0)) == ["Asks", "AsksToo"]
    assert steering.lr_factor == 0.25 and steering.source_weight == {"a": 6.0, "b": 0.0}
    assert steering.ended == "AsksToo: enough"


def test_what_is_frozen_does_not_move_and_an_end_ends_the_run(tiny_model, tokenizer, rows, monkeypatch):
    class Stops(Asks):
        def steer(self, past, state):
            return Steer(freeze=(r"layers\.0\.",), end="enough" if past.step == 2 else "")

    base = dict(tiny_model().named_parameters())
    got = run([Stops()], tiny_model(), tokenizer, rows, steps=8, weight_decay=0.3)
    assert len(got.log.loss) == 3 and got.log.ended == "Stops: enough"
    moved = {n for n, w in got.weights.items() if not torch.equal(w, base[n])}
    assert moved and not any("layers.0." in n for n in moved)


def test_a_source_of_weight_zero_teaches_nothing(tiny_model, tokenizer, rows):
    class Mutes(Asks):
        def steer(self, past, state):
            return Steer(source_weight={"task": 0.0})

    base = dict(tiny_model().named_parameters())
    got = run([Mutes()], tiny_model(), tokenizer, rows, steps=3, warmup_steps=0)
    assert got.log.loss[0][1]["task"] > 0 and all(p["task"] == 0 for _, p in got.log.loss[1:])
    assert any(not torch.equal(w, base[n]) for n, w in got.weights.items())  # of the first step


def test_a_run_that_goes_on_steers_as_if_it_had_not_stopped(tiny_model, tokenizer, rows, tmp_path):
    settings = {"steps": 8, "save_steps": 2}
    whole = run([FINCH(first=5)], tiny_model(), tokenizer, rows, **settings)

    def stop(_session, step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([FINCH(first=5)], tiny_model(), tokenizer, rows, **settings, folder=tmp_path, watch=stop)
    again = run([FINCH(first=5)], tiny_model(), tokenizer, rows, **settings, folder=tmp_path)
    assert all(torch.equal(again.weights[n], w) for n, w in whole.weights.items())


@pytest.mark.parametrize("wrong", [{"power": -1.0}, {"most": 0.0}, {"first": 0}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="FINCH"):
        FINCH(**wrong).check(None)
