"""SkillGraft: the largest changes by hand, ties and the budget, and the ends."""

import pytest
import torch

from holdfast.engine.ranks import counted, within
from holdfast.errors import PlanError
from holdfast.methods import SkillGraft

A, B, EMBEDS = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


def grafted(method, base, tuned):
    """A whole model by name, surveyed and merged."""
    state = {}
    for n in base:
        state.update(method.survey(n, {"base": base[n], "tuned": tuned[n]}, state, 2))
    return {n: method.merge(n, {"base": base[n], "tuned": tuned[n]}, state, 2) for n in base}


def two():
    base = {A: torch.zeros(2, 2), B: torch.ones(2, 2), EMBEDS: torch.zeros(1, 2)}
    tuned = {
        A: torch.tensor([[5.0, -1.0], [0.0, 2.0]]),
        B: torch.tensor([[1.0, -3.0], [2.5, 1.0]]),
        EMBEDS: base[EMBEDS] + 9,
    }
    return base, tuned


def test_hand_value():
    # changes 5, -1, 0, 2 and 0, -4, 1.5, 0: of eight entries a quarter is two, 5 and -4; the embeddings stay
    base, tuned = two()
    got = grafted(SkillGraft(share=0.25), base, tuned)
    assert got[A].tolist() == [[5.0, 0.0], [0.0, 0.0]] and got[B].tolist() == [[1.0, -3.0], [1.0, 1.0]]
    assert torch.equal(got[EMBEDS], base[EMBEDS])
    got = grafted(SkillGraft(share=0.2, embeddings=True), base, tuned)  # two of ten: the embeddings' nines
    assert torch.equal(got[EMBEDS], tuned[EMBEDS]) and torch.equal(got[A], base[A])


def test_the_ends():
    base, tuned = two()
    whole = grafted(SkillGraft(share=1.0, embeddings=True), base, tuned)
    assert all(torch.equal(whole[n], tuned[n]) for n in base)
    none = grafted(SkillGraft(share=0.1), base, tuned)  # less than one of eight
    assert all(torch.equal(none[n], base[n]) for n in base)


def test_of_equal_changes_beyond_the_share_none_is_taken():
    x = torch.tensor([3.0, 2.0, 2.0, 2.0, 0.0])
    for share, number in ((0.2, 1), (0.6, 1), (0.8, 4), (1.0, 4)):
        assert int((x.abs() >= within(counted(x), share)).sum()) == number, share
    assert within(counted(x), 0.1) > 3


def test_values_that_make_no_sense():
    with pytest.raises(PlanError, match=r"SkillGraft\.share"):
        SkillGraft(share=0.0).check(None)
