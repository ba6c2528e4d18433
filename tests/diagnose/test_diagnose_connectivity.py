"""Mode connectivity: the curve of a loss known by hand, its properties, a planted ridge."""

import copy

import numpy as np
import pytest
import torch

from holdfast.diagnose import Case
from holdfast.diagnose.connectivity import Curve, between, curve, diagnose, told
from holdfast.errors import ModelError


class Point(torch.nn.Module):
    """A model of one weight."""

    def __init__(self, x):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor(float(x)))


def test_a_curve_by_hand():
    """From -1 to 1: the loss (1 - x^2) + i of item i is a ridge of 1 at 0; x^2 is convex, so there is none."""
    ridge = curve(Point(-1), Point(1), lambda m: [1 - m.x.item() ** 2 + i for i in range(3)], points=5)
    assert ridge.at.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert ridge.means.tolist() == pytest.approx([1, 1.75, 2, 1.75, 1])
    assert ridge.barrier == pytest.approx(1.0) and ridge.top == 2 and ridge.ridge().low > 0
    assert "There is a ridge" in told(ridge).finding and "u = 0.5" in told(ridge).finding
    valley = curve(Point(-1), Point(1), lambda m: [m.x.item() ** 2 + i for i in range(3)], points=5)
    assert valley.barrier <= 0 and told(valley).finding.startswith("Nothing unusual")
    assert told(valley).scores["best"] == 0.5


def test_turned_round_it_is_the_same():
    losses = np.random.default_rng(0).random((11, 30))
    one, other = (Curve(np.linspace(0, 1, 11), x) for x in (losses, losses[::-1]))
    assert one.barrier == pytest.approx(other.barrier) and one.ridge().value == pytest.approx(other.ridge().value)


def test_noise_is_no_ridge():
    draw = np.random.default_rng(1)
    hits = sum(Curve(np.linspace(0, 1, 11), 5 + draw.normal(size=(11, 60))).ridge().low > 0 for _ in range(40))
    assert hits <= 4


def test_the_ends_are_the_models_and_both_stay(tiny_model):
    a, b = tiny_model(), tiny_model()
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before, into = copy.deepcopy(b.state_dict()), copy.deepcopy(a)
    for u, wanted in ((0.0, a), (1.0, b)):
        between(a, b, into, u)
        assert all(torch.equal(p, q) for p, q in zip(into.parameters(), wanted.parameters(), strict=True))
    between(a, b, into, 0.25)
    for p, x, y in zip(into.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, 0.75 * x + 0.25 * y)
    assert all(torch.equal(w, before[n]) for n, w in b.state_dict().items())
    with pytest.raises(ModelError, match="other parameters"):
        between(a, tiny_model(layers=3), into, 0.5)


def test_the_line_of_two_models_that_are_one_turned_over(tiny_model, tokenizer):
    """Final norm and head of the other sign are the same model; half way it knows nothing, which is best of all here:
    the random model is sure of wrong tokens."""
    base = tiny_model(tied=False)
    with torch.no_grad():
        base.lm_head.weight.mul_(20)
        tuned = copy.deepcopy(base)
        tuned.lm_head.weight.neg_()
        tuned.model.norm.weight.neg_()
    found = diagnose(Case(base, tuned, tokenizer))
    losses = [float(r[1]) for r in found.table[1:]]
    assert losses == pytest.approx(losses[::-1], abs=2e-3) and losses[0] > 1.2 * losses[5]
    assert found.scores["best"] == 0.5 and found.finding.startswith("Nothing unusual")


def test_the_same_model_has_a_constant_curve(tiny_model, tokenizer):
    model = tiny_model()
    found = diagnose(Case(model, model, tokenizer))
    assert found.finding.startswith("Nothing unusual") and found.scores["barrier"] == 0.0
