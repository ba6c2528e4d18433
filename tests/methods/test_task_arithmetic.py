"""Task arithmetic: weighted changes added to the base."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import TaskArithmetic
from holdfast.services import Context


def merged(method, base, *tuned):
    weights = {"base": base, "tuned": tuned[0], **{f"other {n}": t for n, t in enumerate(tuned[1:])}}
    return method.merge("w", weights, {}, 1)


def some(count):
    return torch.randn(count, 500, generator=torch.Generator().manual_seed(0))


def test_hand_value():
    # base (1, 2); tuned (3, 2) and (1, 6), so changes (2, 0) and (0, 4); weights 2 and -1, scale 0.5:
    # (1, 2) + 0.5 * (2 * (2, 0) - (0, 4)) = (3, 0)
    method = TaskArithmetic(models=("m",), scale=0.5, weights=(2.0, -1.0))
    got = merged(method, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.0, 6.0]))
    assert got.tolist() == [3.0, 0.0]


def test_a_change_added_and_subtracted_is_the_base():
    base, tuned = some(2)
    assert torch.equal(merged(TaskArithmetic(models=("m",), weights=(1.0, -1.0)), base, tuned, tuned), base)


def test_one_model_as_it_is():
    base, tuned = some(2)
    torch.testing.assert_close(merged(TaskArithmetic(scale=1.0), base, tuned), tuned)
    assert TaskArithmetic(scale=1.0).off() and TaskArithmetic(scale=-0.5, weights=(-2.0,)).off()
    assert not TaskArithmetic(models=("m",), scale=1.0).off()


def test_negation_goes_the_other_way():
    base, tuned = some(2)
    got = merged(TaskArithmetic(scale=-0.5), base, tuned)
    torch.testing.assert_close(got - base, -0.5 * (tuned - base), atol=1e-6, rtol=1e-5)


def test_the_order_of_models_does_not_matter_and_every_weight_is_linear():
    base, a, b = some(3)
    one, other = (
        merged(TaskArithmetic(models=("m",), weights=w), base, *t)
        for w, t in (((0.3, 2.0), (a, b)), ((2.0, 0.3), (b, a)))
    )
    torch.testing.assert_close(one, other)
    twice = merged(TaskArithmetic(models=("m",), weights=(0.6, 4.0)), base, a, b)
    torch.testing.assert_close(twice - base, 2 * (one - base), atol=1e-5, rtol=1e-4)


def test_weights_must_be_as_many_as_models(tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"TaskArithmetic\.weights has 1 numbers for .* and 1 others"):
        TaskArithmetic(models=("m",), weights=(1.0,)).check(Context(tiny_model(), tokenizer))
