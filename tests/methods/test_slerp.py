"""SLERP: an arc between two weights."""

import math

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import SLERP
from holdfast.services import Context


def walk(t, a, b):
    return SLERP(t=t).merge("w", {"base": a, "tuned": b}, {}, 1)


def test_hand_value():
    # a right angle: t = 1/3 is 30 degrees, sin 60 / sin 90 a + sin 30 / sin 90 b = (sqrt 3 / 2 * 2, 1 / 2 * 4)
    got = walk(1 / 3, torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]))
    assert got.tolist() == pytest.approx([math.sqrt(3), 2.0])


def test_it_starts_at_another_model_where_there_is_one():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    weights = {"base": torch.ones(2), "tuned": b, "start": a}
    assert torch.equal(SLERP(model="m", t=0.3).merge("w", weights, {}, 1), walk(0.3, a, b))
    assert SLERP(model="m").others() == {"start": "m"} and SLERP().others() == {}


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_equal_lengths_stay_and_the_angle_is_cut(t):
    a, b = torch.nn.functional.normalize(torch.randn(2, 100, generator=torch.Generator().manual_seed(0)), dim=1)
    got, whole = walk(t, a, b), (a @ b).acos()
    assert got.norm().item() == pytest.approx(1, abs=1e-6)
    assert (a @ got).acos().item() == pytest.approx(t * whole.item(), abs=1e-5)
    torch.testing.assert_close(got, walk(1 - t, b, a))


def test_both_ends():
    a, b = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(walk(0.0, a, b), a)
    torch.testing.assert_close(walk(1.0, a, b), b)
    assert torch.equal(walk(0.3, a, a), a)


@pytest.mark.parametrize("share, straight", [(0.01, True), (0.05, False)])
def test_small_changes_are_walked_straight(share, straight):
    """Two models leave the straight zone when they differ by about 3.2 %: cos(0.0316) = 0.9995."""
    a, noise = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    b = a + share * noise
    assert torch.equal(walk(0.5, a, b), torch.lerp(a, b, 0.5)) == straight


@pytest.mark.parametrize("a", [[0.0, 0.0], [-1.0, -2.0]], ids=["zeros", "opposite"])
def test_without_an_angle_it_is_a_line(a):
    a, b = torch.tensor(a), torch.tensor([1.0, 2.0])
    assert torch.equal(walk(0.5, a, b), torch.lerp(a, b, 0.5))


@pytest.mark.parametrize("t", [-0.1, 1.1])
def test_values_outside_the_arc_are_refused(t, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"SLERP\.t"):
        SLERP(t=t).check(Context(tiny_model(), tokenizer))
