"""Curriculum by hand: how the pool grows, what is drawn from it, and where the order comes from."""

from collections import Counter
from itertools import islice

import pytest
import torch

from holdfast.data.mix import Mix
from holdfast.engine.forward import forward
from holdfast.engine.pack import token_row
from holdfast.errors import PlanError
from holdfast.methods import Curriculum
from holdfast.services import Context

ROWS = [token_row(range(5, 5 + n), 1) for n in (9, 3, 12, 5, 20, 4, 7, 15, 2, 11)]
BY_LENGTH = [2, 3, 4, 5, 7, 9, 11, 12, 15, 20]


@pytest.mark.parametrize(
    ("pacing", "wanted"),
    [
        ("linear", {0: 2, 1: 3, 5: 6, 9: 10, 10: 10, 25: 10}),  # 10 * (0.2 + 0.8 u): 2, 2.8, 6, 9.2, 10
        ("log", {0: 2, 1: 9, 5: 10, 10: 10}),  # 1 + 0.1 ln(0.1 + e^-10) = 0.7698: 10 * (0.2 + 0.8 * 0.7698) = 8.16
    ],
)
def test_the_pool_grows_by_hand(pacing, wanted):
    method = Curriculum(start=0.2, pacing=pacing)
    assert {n: method.pool(n, 10) for n in wanted} == wanted


def test_the_pool_of_two_epochs_and_of_one_row():
    """After 10 of 20: 10 * (0.2 + 0.8 * 0.5) = 6. The smallest pool holds one row."""
    assert Curriculum(start=0.2, epochs=2.0).pool(10, 10) == 6
    assert Curriculum(start=0.01).pool(0, 10) == 1


@pytest.mark.parametrize("hardest_first", [False, True])
def test_every_row_is_one_of_the_easiest_so_far(hardest_first):
    method = Curriculum(by="length", start=0.2, hardest_first=hardest_first)
    mix = method.data(Mix(ROWS), Context(None, None))
    order, seen = BY_LENGTH[::-1] if hardest_first else BY_LENGTH, set()
    for seed in range(40):
        for n, row in enumerate(islice(mix.draw(seed), 10)):
            assert len(row.ids) in order[: method.pool(n, 10)]
            seen.add((n, len(row.ids)))
    assert {length for n, length in seen if n == 5} == set(order[:6])  # any of the pool may come


def test_a_full_pool_gives_shuffled_rounds_of_all_rows():
    mix = Curriculum(by="length").data(Mix(ROWS), Context(None, None))
    drawn = [len(r.ids) for r in islice(mix.draw(0), 40)]
    for turn in (1, 2, 3):
        assert sorted(drawn[10 * turn : 10 * turn + 10]) == BY_LENGTH
    assert drawn[10:20] != drawn[20:30] and drawn != [len(r.ids) for r in islice(mix.draw(1), 40)]
    assert Counter(drawn[:10]) != Counter(BY_LENGTH)


@torch.no_grad()
def test_the_loss_is_the_bases_mean_by_token(tiny_model):
    model = tiny_model()
    got = Curriculum().difficulty(ROWS, Context(model, None))
    for row, value in zip(ROWS, got, strict=True):
        packed, logits = forward(model, [row])
        assert value == pytest.approx(torch.nn.functional.cross_entropy(logits, packed.target).item(), rel=1e-5)


@pytest.mark.parametrize("wrong", [{"by": "size"}, {"pacing": "root"}, {"start": 0.0}, {"epochs": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(PlanError, match=f"Curriculum.{next(iter(wrong))}"):
        Curriculum(**wrong).check(Context(None, None))
