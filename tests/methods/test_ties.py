"""TIES: trimmed changes, an elected sign, the mean of those who agree."""

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from holdfast.engine.ranks import counted, threshold
from holdfast.errors import PlanError
from holdfast.methods import TIES
from holdfast.services import Context


def merged(method, base, *tuned):
    """One tensor as a whole model: surveyed, then merged."""
    weights = {"base": base, "tuned": tuned[0], **{f"other {n}": t for n, t in enumerate(tuned[1:])}}
    state = method.survey("w", weights, {}, 1) or {}
    return method.merge("w", weights, state, 1)


def random_changes(count=3, size=1000):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_hand_values(trim):
    # base (1, 1, 1, 1); changes (4, -3, 0.5, 0), (2, 5, 0, 0.1), (-3, 0.2, 0, 2); two of four numbers are kept of
    # each: (4, -3, 0, 0), (2, 5, 0, 0), (-3, 0, 0, 2). Sums 3, 2, 0, 2: all elected signs are +.
    # Means of those that agree: (4 + 2) / 2 = 3, 5, nothing, 2. Half of that on the base: 2.5, 3.5, 1, 2.
    changes = torch.tensor([[4.0, -3.0, 0.5, 0.0], [2.0, 5.0, 0.0, 0.1], [-3.0, 0.2, 0.0, 2.0]])
    base = torch.ones(4)
    got = merged(TIES(density=0.5, scale=0.5, trim=trim), base, *(base + changes))
    torch.testing.assert_close(got, torch.tensor([2.5, 3.5, 1.0, 2.0]))


def test_the_convention_on_the_tensors_where_libraries_differ():
    # tau (3, 1), (-2, 1), nothing trimmed: masses 1 and 2 elect +, and the means are 3 and 1. PEFT with its weights
    # (.2, .8) elects the same and gives (.2 * 3 / 1, (.2 + .8) / 2) = (0.6, 0.5). mergekit elects on weighted changes:
    # .6 - 1.6 < 0, so it gives (-2, 1). The paper has no weights.
    taus = torch.tensor([[3.0, 1.0], [-2.0, 1.0]])
    assert merged(TIES(density=1.0), torch.zeros(2), *taus).tolist() == [3.0, 1.0]
    with pytest.warns(UserWarning, match="no pruning"):
        assert peft_ties(list(taus), torch.tensor([0.2, 0.8]), 1.0).tolist() == pytest.approx([0.6, 0.5])


def test_trimmed_by_tensor_it_is_pefts_function_with_weights_of_1():
    taus = random_changes()
    got = merged(TIES(density=0.3, trim="tensor"), torch.zeros(1000), *taus)
    assert torch.equal(got, peft_ties(list(taus), torch.ones(3), 0.3))


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_an_entry_is_0_or_has_the_elected_sign(trim):
    taus = random_changes()
    got = merged(TIES(density=0.3, trim=trim), torch.zeros(1000), *taus)
    least = taus.abs().topk(300).values[:, -1:]
    trimmed = taus * (taus.abs() >= least)
    assert torch.equal(got.sign(), trimmed.sum(0).sign()) and (got == 0).any() and (got < 0).any()
    assert (got.abs() <= trimmed.abs().max(0).values + 1e-6).all()


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_equal_models_give_their_trimmed_change(trim):
    tau = random_changes(1)[0]
    method = TIES(density=0.25, trim=trim)
    one, three = merged(method, torch.zeros(1000), tau), merged(method, torch.zeros(1000), tau, tau, tau)
    torch.testing.assert_close(three, one)
    kept = int((one != 0).sum())
    assert kept == 250 if trim == "tensor" else 250 <= kept <= 252  # what lies in the threshold's bin stays
    assert torch.equal(one[one != 0], tau[one != 0])


def test_opposite_models_of_equal_mass_give_the_positive_one():
    tau = random_changes(1)[0]
    assert torch.equal(merged(TIES(density=1.0), torch.zeros(1000), tau, -tau), tau.abs())


def test_the_order_of_the_models_does_not_matter():
    taus = random_changes()
    one, other = (merged(TIES(density=0.4), torch.zeros(1000), *taus[list(o)]) for o in ((0, 1, 2), (2, 0, 1)))
    torch.testing.assert_close(one, other)


def test_agreeing_models_without_trimming_are_averaged():
    taus = random_changes().abs()
    torch.testing.assert_close(merged(TIES(density=1.0), torch.zeros(1000), *taus), taus.mean(0))


def test_a_scale_of_0_is_the_base():
    base, *tuned = random_changes()
    assert torch.equal(merged(TIES(scale=0.0), base, *tuned), base)


def test_the_whole_model_is_ranked_together():
    """A tensor of small changes is dropped whole, one of large changes kept; tensor by tensor half of each stays."""
    zero, small, large = torch.zeros(100), torch.linspace(0.01, 0.02, 100), torch.linspace(1, 2, 100)
    pairs = {"small": {"base": zero, "tuned": small}, "large": {"base": zero, "tuned": large}}
    for trim, wanted in (("model", (0, 100)), ("tensor", (50, 50))):
        method, state = TIES(density=0.5, trim=trim), {}
        for name, weights in pairs.items():
            state.update(method.survey(name, weights, state, 1) or {})
        kept = tuple(int((method.merge(n, w, state, 1) != 0).sum()) for n, w in pairs.items())
        assert kept == wanted


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e20])
@pytest.mark.parametrize("share", [1e-6, 0.2, 0.9, 1.0])
def test_the_threshold_lies_within_a_bin_of_the_exact_one(share, scale):
    parts = random_changes(4, 25_000) * scale
    found = threshold(sum(counted(p) for p in parts), share)
    exact = parts.abs().flatten().topk(max(1, int(share * 100_000))).values[-1].item()
    assert exact * (1 - 2**-11) <= found <= exact


def test_a_threshold_of_mostly_unmoved_numbers_is_0():
    assert threshold(counted(torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0])), 0.5) == 0


@pytest.mark.parametrize(
    "wrong", [{"density": 0.0}, {"density": 1.2}, {"scale": -1.0}, {"trim": "layer"}], ids=lambda w: next(iter(w))
)
def test_values_without_a_meaning_are_refused(wrong, tiny_model, tokenizer):
    with pytest.raises(PlanError, match=rf"TIES\.{next(iter(wrong))}"):
        TIES(**wrong).check(Context(tiny_model(), tokenizer))
