"""Model Breadcrumbs: the largest and the smallest entries of a change dropped."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import Breadcrumbs
from holdfast.services import Context


def merged(method, base, *tuned):
    weights = {"base": base, "tuned": tuned[0], **{f"other {n}": t for n, t in enumerate(tuned[1:])}}
    return method.merge("w", weights, {}, 1)


def test_hand_values():
    # base 1; change (10, -1, 3, -5, 2, 0, 4, 0.5, 1.5, -2.5), ten entries. outliers 0.1: the 10 goes. density 0.3: the
    # next three by magnitude stay, -5, 4 and 3. Half of them on the base: 1 - 2.5, 1 + 2, 1 + 1.5.
    tau = torch.tensor([10.0, -1.0, 3.0, -5.0, 2.0, 0.0, 4.0, 0.5, 1.5, -2.5])
    got = merged(Breadcrumbs(density=0.3, outliers=0.1, scale=0.5), torch.ones(10), 1 + tau)
    assert got.tolist() == [1.0, 1.0, 2.5, -1.5, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0]


def test_several_models_are_masked_each_and_added():
    one, other = torch.tensor([4.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 4.0])
    method = Breadcrumbs(models=("m",), density=0.25, outliers=0.25)
    assert merged(method, torch.zeros(4), one, other).tolist() == [0.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("size", [7, 50, 1000])
def test_both_tails_go_and_the_count_is_kept(size, outliers):
    """Tensors of fewer than 1 / outliers entries too: no outlier goes there, and the rest is no empty slice."""
    tau = torch.randn(size, generator=torch.Generator().manual_seed(0))
    got = merged(Breadcrumbs(density=0.4, outliers=outliers), torch.zeros(size), tau)
    kept, ranked = got[got != 0].abs(), tau.abs().sort(descending=True).values
    first = int(outliers * size)
    assert len(kept) == int(0.4 * size)
    assert kept.max() == ranked[first] and kept.min() == ranked[first + len(kept) - 1]


def test_one_tensors_size_does_not_matter_to_another():
    tau = torch.randn(200, generator=torch.Generator().manual_seed(0))
    one, large = (merged(Breadcrumbs(), torch.zeros(200), s * tau) for s in (1.0, 64.0))
    assert torch.equal(64 * one, large)


def test_without_tails_nothing_goes():
    base, tuned = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(Breadcrumbs(density=1.0, outliers=0.0), base, tuned), tuned)
    assert Breadcrumbs(density=1.0, outliers=0.0).off() and not Breadcrumbs(density=1.0).off()


@pytest.mark.parametrize("wrong", [{"density": 0.0}, {"density": 2.0}, {"outliers": 1.0}, {"outliers": -0.1}])
def test_values_without_a_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=rf"Breadcrumbs\.{next(iter(wrong))}"):
        Breadcrumbs(**wrong).check(Context(tiny_model(), tokenizer))
