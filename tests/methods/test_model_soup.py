"""Model soup: the mean of several models."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import ModelSoup, WiSEFT
from holdfast.services import Context


def merged(method, base, *tuned):
    weights = {"base": base, "tuned": tuned[0], **{f"other {n}": t for n, t in enumerate(tuned[1:])}}
    return method.merge("w", weights, {}, 1)


def some(count):
    return torch.randn(count, 500, generator=torch.Generator().manual_seed(0))


def test_hand_values():
    # (3 + 6) / 2 = 4.5 without the base; twice the base 0: (2 * 0 + 3 + 6) / 4 = 2.25
    base, three, six = (torch.tensor([x]) for x in (0.0, 3.0, 6.0))
    assert merged(ModelSoup(models=("m",)), base, three, six).item() == 4.5
    assert merged(ModelSoup(models=("m",), base=2), base, three, six).item() == 2.25


def test_it_is_the_mean_of_any_number_in_any_order():
    base, *tuned = some(5)
    got = merged(ModelSoup(models=("a", "b", "c")), base, *tuned)
    wanted = torch.stack(tuned).double().mean(0).float()
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(merged(ModelSoup(models=("a", "b", "c")), base, *tuned[::-1]), got)


def test_equal_models_stay():
    base, tuned = some(2)
    torch.testing.assert_close(merged(ModelSoup(models=("m",)), base, tuned, tuned), tuned)


def test_one_model_and_the_base_are_wise_ft():
    base, tuned = some(2)
    wanted = WiSEFT(alpha=0.5).merge("w", {"base": base, "tuned": tuned}, {}, 1)
    torch.testing.assert_close(merged(ModelSoup(base=1), base, tuned), wanted)


@pytest.mark.parametrize("wrong, match", [({}, "one model alone"), ({"base": -1}, r"ModelSoup\.base")])
def test_nothing_to_average_is_refused(wrong, match, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=match):
        ModelSoup(**wrong).check(Context(tiny_model(), tokenizer))
