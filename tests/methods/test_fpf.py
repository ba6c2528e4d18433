"""FPF: scores and choice by hand, and what the stages of a real run draw and change."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.methods import FPF
from holdfast.methods.stages.fpf import most_forgetful, scores
from holdfast.services import Context

GENERAL = ("holdfast:general/instructions.jsonl",)


def test_scores_by_hand():
    """Type a: 1, 2, 6 with median 2; b has no fellows: over the median of 1, 2, 6, 4, which is 3."""
    moved = {"m.0.a": 1.0, "m.1.a": 2.0, "m.2.a": 6.0, "b": 4.0}
    assert scores(moved) == {"m.0.a": 0.5, "m.1.a": 1.0, "m.2.a": 3.0, "b": pytest.approx(4 / 3)}
    assert scores(dict(reversed(moved.items()))) == scores(moved)
    assert scores({"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}


def test_the_largest_that_fit_are_chosen():
    score, sizes = {"a": 5.0, "b": 3.0, "c": 2.0, "d": 0.0}, {"a": 30, "b": 50, "c": 20, "d": 0}
    assert most_forgetful(score, sizes, 30) == {"a"}
    assert most_forgetful(score, sizes, 50) == {"a", "c"}  # b would be too much
    assert most_forgetful(score, sizes, 100) == {"a", "b", "c"} and most_forgetful(score, sizes, 10) == set()


def test_k_times_in_turn_only_the_chosen_move_on_rows_of_their_own(tiny_model, tokenizer, rows):
    at, masks, drawn = {}, {}, {}

    def watch(session, step):
        at[step] = {n: p.detach().clone() for n, p in session.params.items()}
        masks[step] = {n: bool(m.all()) for n, m in session.chosen.masks.items()}
        drawn[step] = session.stage.name

    method = FPF(k=2, repair_share=0.5, sources=GENERAL, max_tokens=32)
    got = run([method], tiny_model(), tokenizer, rows, 8, watch=watch)
    assert [drawn[n] for n in range(1, 9)] == ["train 1"] * 2 + ["repair 1"] * 2 + ["train 2"] * 2 + ["repair 2"] * 2
    assert got.log.realised["task/examples"] == got.log.realised["FPF:instructions/examples"] == 16
    sizes = {n: p.numel() for n, p in at[2].items()}
    for before, after in ((2, 4), (6, 8)):
        chosen = {n for n, on in masks[after].items() if on}
        assert chosen and sum(sizes[n] for n in chosen) <= 0.1 * sum(sizes.values())
        assert {n for n in sizes if not torch.equal(at[after][n], at[before][n])} == chosen
    assert not masks[6] and all(not torch.equal(at[6][n], at[4][n]) for n in sizes)


def test_the_loss_on_the_rows_for_repair_falls(tiny_model, tokenizer, rows):
    method = FPF(repair_share=0.5, budget=0.5, sources=GENERAL, max_tokens=32)
    got = run([method], tiny_model(), tokenizer, rows, 24, learning_rate=5e-3)
    repair = [p["task"] for s, p in got.log.loss][12:]
    assert sum(repair[-3:]) < sum(repair[:3])


def test_nothing_small_enough(tiny_model, tokenizer, rows):
    with pytest.raises(PlanError, match="no tensor that moved is so small"):
        run([FPF(budget=1e-9, sources=GENERAL)], tiny_model(), tokenizer, rows, 4)


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"repair_share": 1.0}, {"k": -1}, {"sources": ()}, {"k": 9}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="FPF"):
        FPF(**wrong).check(Context(None, None, total_steps=10))
