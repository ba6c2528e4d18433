"""DARE: entries of the change dropped at random, the rest enlarged."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import DARE
from holdfast.services import Context


def merged(method, base, *tuned, seed=0, name="w"):
    weights = {"base": base, "tuned": tuned[0], **{f"other {n}": t for n, t in enumerate(tuned[1:])}}
    return method.merge(name, weights, {"seed": torch.tensor(seed)}, 1)


def test_hand_values():
    # base 1, change 3, density 0.25, scale 0.5: an entry is 1, or 1 + 0.5 * 3 / 0.25 = 7
    got = merged(DARE(density=0.25, scale=0.5), torch.ones(10_000), torch.full((10_000,), 4.0))
    assert set(got.tolist()) == {1.0, 7.0}
    share = (got == 7).float().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 10_000) ** 0.5


def test_the_mean_over_masks_is_the_change():
    tau, density, draws = torch.tensor([1.0, -2.0, 0.5]), 0.2, 2000
    mean = sum(merged(DARE(density=density), torch.zeros(3), tau, seed=s) for s in range(draws)) / draws
    sigma = tau.abs() * ((1 - density) / density / draws) ** 0.5
    assert ((mean - tau).abs() < 4 * sigma).all()


def test_masks_differ_by_seed_tensor_and_model_alone():
    base, tau = torch.zeros(1000), torch.ones(1000)
    one = merged(DARE(), base, tau)
    torch.manual_seed(5)
    assert torch.equal(one, merged(DARE(), base, tau))
    assert not torch.equal(one, merged(DARE(), base, tau, seed=1))
    assert not torch.equal(one, merged(DARE(), base, tau, name="v"))
    both = merged(DARE(models=("m",)), base, tau, tau)
    assert set(both.tolist()) == {0.0, 10.0, 20.0}


def test_nobody_elses_random_numbers_are_used_up():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    merged(DARE(), torch.zeros(9), torch.ones(9))
    assert torch.equal(torch.rand(4), wanted)


def test_a_density_of_1_changes_nothing():
    base, tuned = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(DARE(density=1.0), base, tuned), tuned)
    assert DARE(density=1.0).off() and not DARE(density=1.0, models=("m",)).off()


def test_the_seed_is_the_runs(tiny_model, tokenizer):
    assert int(DARE().prepare(Context(tiny_model(), tokenizer, seed=7))["seed"]) == 7


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_values_without_a_meaning_are_refused(density, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"DARE\.density"):
        DARE(density=density).check(Context(tiny_model(), tokenizer))
