"""SpIEL: who leaves and who joins, by hand, and that what left is the base again."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods import SpIEL
from holdfast.methods.adapt.spiel import reselected
from holdfast.sites.steering import Steering

NAME = "layers.0.w"


@pytest.mark.parametrize(
    "candidates, score, n, wanted",
    [
        # sizes 0.3, 0.1, 0.2 of entries 0, 3, 5: with n = 2 entries 3 and 5 may go and 0 stays
        ([1, 3, 4], [5, 2, 9], 2, [0, 1, 4]),  # 4 and 1 join
        ([1, 3, 4], [1, 7, 9], 2, [0, 3, 4]),  # 4 joins; 3 is grown again, so only 5 leaves
        ([1, 3, 4], [5, 2, 9], 1, [0, 4, 5]),  # 3 leaves for 4
        ([0, 4], [9, 1], 2, [0, 4, 5]),  # 0 stays anyway: one joins, and the smallest leaves
        ([0], [9], 2, [0, 3, 5]),  # nobody joins, so nobody leaves
        ([1, 3, 4], [5, 2, 9], 0, [0, 3, 5]),
    ],
)
def test_who_leaves_and_who_joins(candidates, score, n, wanted):
    active, size = torch.tensor([0, 3, 5]), torch.tensor([0.3, 0.1, 0.2])
    got = reselected(active, size, torch.tensor(candidates), torch.tensor(score, dtype=torch.float), n)
    assert got.tolist() == wanted


def test_gradients_are_added_up_by_hand():
    """2 of 4 entries, gradients of 2 steps in every 4, base 0.
    Steps 0 and 1: (1, -4, 3, 0) names 1 and 2; with (9, 4.5, 1, 0) they have 0.5, 4. The first time all may go: 1, 2.
    Steps 4 and 5, d = (0, 0.2, -0.1, 0): (1, 0, 2, -5) names 3 and 2; with (0, 0, 0, 1) they have -4 and 2. n =
    int(1 * (1 - 6 / 100) * 2) = 1: entry 2 may go, 3 joins."""
    method = SpIEL(density=0.5, every=4, accumulate=2, rate=1.0)
    steering = Steering([method], {"SpIEL": {}})
    state = steering.state["SpIEL"]
    weight, base = torch.zeros(1, 4), {NAME: torch.zeros(1, 4)}

    def step(n, *grad):
        past = Past(n, 100, {}, 1e-3, grads={NAME: torch.tensor([grad])}, params={NAME: weight}, base=base)
        return steering.ask(past)

    first = method.entries(NAME, weight, state, 0)
    assert first.sum() == 2 and torch.equal(first, SpIEL(density=0.5).entries(NAME, weight, {}, 0))
    step(0, 1.0, -4.0, 3.0, 0.0)
    assert state[f"candidates/{NAME}"].tolist() == [1, 2] and state[f"sums/{NAME}"].tolist() == [-4, 3]
    assert torch.equal(method.entries(NAME, weight, state, 1), first)
    step(1, 9.0, 4.5, 1.0, 0.0)
    assert state[f"sums/{NAME}"].tolist() == [0.5, 4]
    assert method.entries(NAME, weight, state, 2).tolist() == [[False, True, True, False]]
    assert [n for n in range(12) if method.redraws(n)] == [0, 2, 6, 10]
    assert step(2, 7.0, 7.0, 7.0, 7.0) == [] and state[f"sums/{NAME}"].tolist() == [0.5, 4]
    weight.copy_(torch.tensor([[0.0, 0.2, -0.1, 0.0]]))
    step(4, 1.0, 0.0, 2.0, -5.0)
    step(5, 0.0, 0.0, 0.0, 1.0)
    assert method.entries(NAME, weight, state, 6).tolist() == [[False, True, False, True]]


def test_nothing_but_the_last_choice_differs_from_the_base(tiny_model, tokenizer, rows):
    """Entries that had trained before are the base again, to the last bit, weight decay or not."""
    base, middle = dict(tiny_model().named_parameters()), {}

    def watch(session, step):
        if step == 6:
            middle.update({n: p.detach() != base[n] for n, p in session.model.named_parameters()})

    method = SpIEL(density=0.05, every=4, accumulate=3, rate=1.0)
    settings = {"weight_decay": 0.3, "lr_scheduler_type": "constant", "watch": watch}
    got = run([method], tiny_model(), tokenizer, rows, 10, **settings)
    left = 0
    for name, w in got.weights.items():
        moved = w != base[name]
        chosen = got.session.state["SpIEL"].get(f"entries/{name}", torch.zeros_like(moved))
        assert not (moved & ~chosen).any()
        left += int((middle[name] & ~chosen).sum())
    assert left > 100


def test_killed_between_two_sums_it_goes_on(tiny_model, tokenizer, rows, tmp_path):
    plan, settings = [SpIEL(density=0.05, every=5, accumulate=3)], {"steps": 10, "save_steps": 2}
    whole = run(plan, tiny_model(), tokenizer, rows, **settings)

    def stop(_session, step):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, tiny_model(), tokenizer, rows, **settings, folder=tmp_path, watch=stop)
    again = run(plan, tiny_model(), tokenizer, rows, **settings, folder=tmp_path)
    assert all(torch.equal(again.weights[n], w) for n, w in whole.weights.items())


@pytest.mark.parametrize("wrong", [{"density": 2.0}, {"rate": -0.1}, {"accumulate": 0}, {"accumulate": 21}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="SpIEL"):
        SpIEL(**wrong).check(None)
