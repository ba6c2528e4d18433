"""ClassSeparability: the tree's edges by hand, invariances, and the end of a run."""

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist

from cases import run
from holdfast.errors import PlanError
from holdfast.method import Past
from holdfast.methods import ClassSeparability
from holdfast.methods.steer import class_separability as module
from holdfast.methods.steer.class_separability import embed, lifetimes, separability
from holdfast.services import Context


def test_edges_and_score_by_hand():
    """Four points of length 1, mean 0: (1, 0), (0, 1), (-1, 0), (0, -1): three edges of sqrt(2), p = 1/3 each,
    H = log 3, S = 1 - log 3 / log 3 = 0. Two pairs (1, 0), (1, 0), (-1, 0), (-1, 0): edges 0, 0, 2: H = 0, S = 1."""
    square = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert lifetimes(square) == pytest.approx([2**0.5] * 3) and separability(square) == pytest.approx(0.0)
    pairs = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert lifetimes(pairs).tolist() == [0, 0, 2] and separability(pairs) == pytest.approx(1.0)
    assert separability(np.ones((5, 3))) == 0.0  # all the same: nothing to say


def test_edges_are_those_of_the_minimum_spanning_tree_and_do_not_turn_or_scale():
    draw = np.random.default_rng(0)
    points = draw.normal(size=(20, 6))
    unit = points - points.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    tree = minimum_spanning_tree(cdist(unit, unit)).toarray()
    assert lifetimes(points) == pytest.approx(np.sort(tree[tree > 0]))
    turn = np.linalg.qr(draw.normal(size=(6, 6)))[0]
    for same in (points @ turn, points * 7 + 3, points[::-1]):
        assert separability(same) == pytest.approx(separability(points))


def test_clusters_score_higher():
    draw = np.random.default_rng(1)
    cloud = draw.normal(size=(40, 8))
    apart = 0.05 * draw.normal(size=(40, 8)) + np.repeat(draw.normal(size=(4, 8)), 10, axis=0)
    assert separability(apart) > separability(cloud) + 0.05


def test_embeddings_are_means_of_the_last_states(tiny_model):
    model = tiny_model()
    rows = [torch.tensor([5, 9, 7]), torch.tensor([11, 4, 4, 8, 20])]
    with torch.no_grad():
        wanted = [model(r[None], output_hidden_states=True).hidden_states[-1][0].mean(0) for r in rows]
    assert embed(model, rows) == pytest.approx(torch.stack(wanted).numpy(), abs=1e-5)


def test_patience_by_hand(monkeypatch, tiny_model, tokenizer, rows):
    """Scores 0.1, 0.2, 0.2, 0.201, 0.3 at looks 1 to 5, patience 2: the third and the fourth are no rise of 1 %."""
    method = ClassSeparability(texts=4, every=2, patience=2)
    state = method.prepare(Context(tiny_model(), tokenizer, rows=rows))
    scores = iter([0.1, 0.2, 0.2, 0.201, 0.3])
    monkeypatch.setattr(module, "embed", lambda *_: None)
    monkeypatch.setattr(module, "separability", lambda _: next(scores))
    ends = []
    for step in range(9):
        said = method.steer(Past(step, 20, {}, 1.0), state)
        assert (said is None) == (step in (0, 1, 3, 5, 7))
        if said:
            state.update(said.state)
            ends.append(bool(said.end))
    assert ends == [False, False, False, True] and float(state["best"]) == 0.2


def test_a_run_ends_when_nothing_rises_any_more(tiny_model, tokenizer, rows):
    never = run([ClassSeparability(texts=8, every=2, least=1e9, patience=2)], tiny_model(), tokenizer, rows, steps=12)
    assert never.log.ended.startswith("ClassSeparability: the separability") and len(never.log.loss) == 7
    # looking does not change anything
    short = run([], tiny_model(), tokenizer, rows, steps=12, lr_scheduler_type="constant")
    same = run([ClassSeparability(texts=8, every=2, patience=9)], tiny_model(), tokenizer, rows, steps=12,
               lr_scheduler_type="constant")  # fmt: skip
    assert all(torch.equal(w, short.weights[n]) for n, w in same.weights.items())


@pytest.mark.parametrize("wrong", [{"texts": 3}, {"every": 0}, {"patience": -1}, {"least": -0.1}])
def test_values_that_make_no_sense(wrong):
    with pytest.raises(PlanError, match="ClassSeparability"):
        ClassSeparability(**wrong).check(None)


def test_it_needs_prompts():
    with pytest.raises(PlanError, match="fewer than 4 different"):
        ClassSeparability().check(Context(None, None))
