"""A head that forgets: scikit-learn's ridge as the oracle, requests in any order, refusals, files, real states."""

import pytest
import torch

from holdfast.errors import HoldfastError
from holdfast.runs.head_states import expand, features
from holdfast.runs.ridge_head import RidgeHead, best_ridge
from tiny import build_model

LABELS = ["a", "b", "c"]
WIDTH, NUM = 7, 40
TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STATES = draw(NUM, WIDTH)
NAMES = [LABELS[n % 3] for n in range(NUM)]


def head_of(at, ridge=0.5):
    head = RidgeHead.empty(WIDTH, LABELS, ridge)
    head.learn(STATES[at], [NAMES[n] for n in at])
    return head


def forget(head, at):
    head.forget(STATES[at], [NAMES[n] for n in at])
    return head


def same(one, other):
    torch.testing.assert_close(one.weights, other.weights, **TIGHT)
    torch.testing.assert_close(one.inverse, other.inverse, **TIGHT)
    assert one.rows == other.rows and one.labels == other.labels


def sklearn_weights(at, ridge=0.5):
    linear = pytest.importorskip("sklearn.linear_model")
    hot = torch.tensor([[float(NAMES[n] == label) for label in LABELS] for n in at], dtype=torch.float64)
    fitted = linear.Ridge(alpha=ridge, fit_intercept=False).fit(STATES[at].numpy(), hot.numpy())
    return torch.tensor(fitted.coef_.T)


def test_one_row_by_hand():
    """P = (2), y = 1, g = 1: R = 1 / 5, W = 2 / 5; without the row R = 1 and W = 0."""
    head = RidgeHead.empty(1, ["yes"])
    head.learn(torch.tensor([[2.0]]), ["yes"])
    assert head.inverse.item() == pytest.approx(0.2) and head.weights.item() == pytest.approx(0.4)
    head.forget(torch.tensor([[2.0]]), ["yes"])
    assert head.inverse.item() == pytest.approx(1.0) and head.weights.item() == pytest.approx(0.0)


def test_learning_is_sklearns_ridge():
    every = list(range(NUM))
    torch.testing.assert_close(head_of(every).weights, sklearn_weights(every), **TIGHT)
    parts = RidgeHead.empty(WIDTH, LABELS, 0.5)
    for at in (every[:1], every[1:25], every[25:]):
        parts.learn(STATES[at], [NAMES[n] for n in at])
    same(parts, head_of(every))


def test_forgetting_is_a_fit_on_what_is_kept():
    gone = [3, 11, 12, 30]
    kept = [n for n in range(NUM) if n not in gone]
    head = forget(head_of(list(range(NUM))), gone)
    torch.testing.assert_close(head.weights, sklearn_weights(kept), **TIGHT)
    same(head, head_of(kept))


def test_the_order_of_requests_does_not_matter():
    one = forget(forget(head_of(list(range(NUM))), [1, 2, 3]), [20])
    other = forget(head_of(list(range(30))), [20])
    other.learn(STATES[30:], NAMES[30:])
    same(one, forget(other, [3, 1, 2]))


def test_learn_then_forget_restores_and_all_forgotten_is_empty():
    head, before = head_of(list(range(20))), head_of(list(range(20)))
    head.learn(STATES[20:], NAMES[20:])
    assert not torch.allclose(head.weights, before.weights)
    same(forget(head, list(range(20, NUM))), before)
    same(forget(head, list(range(20))), RidgeHead.empty(WIDTH, LABELS, 0.5))


def test_many_rows_go_in_pieces():
    states, names = draw(2500, WIDTH, seed=4), [LABELS[n % 3] for n in range(2500)]
    head = RidgeHead.empty(WIDTH, LABELS)
    head.learn(states, names)
    wanted = torch.linalg.inv(states.T @ states + torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(head.inverse, wanted, **TIGHT)
    head.forget(states, names)
    torch.testing.assert_close(head.inverse, torch.eye(WIDTH, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_a_class_goes_with_its_column():
    head = head_of(list(range(NUM)))
    mine = [n for n in range(NUM) if NAMES[n] == "b"]
    head.forget_class("b", STATES[mine])
    other = RidgeHead.empty(WIDTH, ["a", "c"], 0.5)
    kept = [n for n in range(NUM) if NAMES[n] != "b"]
    other.learn(STATES[kept], [NAMES[n] for n in kept])
    same(head, other)
    assert set(head.predict(STATES)) <= {"a", "c"}


@pytest.mark.parametrize("num", [0, 5, 12])
def test_rows_that_were_not_learnt_are_refused_and_nothing_changes(num):
    head = head_of(list(range(num))) if num else RidgeHead.empty(WIDTH, LABELS, 0.5)
    same_before = (head.weights.clone(), head.inverse.clone(), head.rows)
    with pytest.raises(HoldfastError, match="does not hold these rows"):
        head.forget(3 * STATES[30:31], ["a"])
    assert torch.equal(head.weights, same_before[0]) and torch.equal(head.inverse, same_before[1])
    assert head.rows == same_before[2]
    if num:
        forget(head, [0])
        with pytest.raises(HoldfastError, match="does not hold these rows"):
            forget(forget(head, list(range(1, num))), [0])  # a second time


def test_a_row_inside_the_bound_of_r_alone_is_refused():
    """I - P R P^T is positive definite, but R would pass I / g: no rows can leave that behind."""
    head = RidgeHead.empty(1, ["yes"])
    head.learn(torch.tensor([[1.0]]), ["yes"])  # R = 1 / 2
    with pytest.raises(HoldfastError, match="does not hold"):
        head.forget(torch.tensor([[1.2]]), ["yes"])  # 1 - 1.44 / 2 > 0, R would be 1 / 0.56
    head.forget(torch.tensor([[1.0]]), ["yes"])


def test_numbers_as_targets_and_prediction():
    head = RidgeHead.empty(WIDTH, ["reward"], 1e-6)
    truth = draw(WIDTH, 1, seed=2)
    head.learn(STATES, STATES @ truth)
    torch.testing.assert_close(head.scores(STATES), STATES @ truth, rtol=1e-5, atol=1e-5)
    near = RidgeHead.empty(3, LABELS)
    near.learn(torch.eye(3), LABELS)
    assert near.predict(torch.eye(3)) == LABELS


def test_the_ridge_is_chosen_on_held_rows():
    """Noise in few rows wants a large ridge, labels that follow the states none."""
    clear = [LABELS[int(n)] for n in STATES[:, :3].argmax(1)]
    assert best_ridge((STATES[:30], clear[:30]), (STATES[30:], clear[30:]), LABELS) < 100
    noise = draw(8, WIDTH, seed=7)
    assert best_ridge((noise, NAMES[:8]), (STATES, NAMES), LABELS) == 100


def test_saved_and_loaded(tmp_path):
    head = head_of(list(range(20)), ridge=0.1)
    head.save(tmp_path / "head.safetensors")
    got = RidgeHead.load(tmp_path / "head.safetensors")
    assert torch.equal(got.weights, head.weights) and torch.equal(got.inverse, head.inverse)
    assert (got.labels, got.ridge, got.rows) == (LABELS, 0.1, 20)
    same(forget(got, list(range(20))), RidgeHead.empty(WIDTH, LABELS, 0.1))
    (tmp_path / "other").write_bytes(b"no head")
    for name in ("other", "absent"):
        with pytest.raises(HoldfastError, match="is not a head"):
            RidgeHead.load(tmp_path / name)


def test_states_of_a_model():
    model, texts = build_model(), [[0, 17, 42, 9], [0, 5]]
    last, mean = features(model, texts), features(model, texts, "mean")
    for n, ids in enumerate(texts):
        with torch.no_grad():
            wanted = model.model(torch.tensor([ids])).last_hidden_state[0].double()
        torch.testing.assert_close(last[n], wanted[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean[n], wanted.mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(features(model, texts[1:]), last[1:])
    wide = expand(last, 50, seed=1)
    assert wide.shape == (2, 50) and bool((wide >= 0).all()) and bool((wide == 0).any())
    assert torch.equal(wide, expand(last, 50, seed=1)) and not torch.equal(wide, expand(last, 50, seed=2))


def test_what_makes_no_sense():
    for wrong in ({"width": 0}, {"labels": []}, {"labels": ["a", "a"]}, {"ridge": 0.0}):
        with pytest.raises(HoldfastError, match="A head was asked for"):
            RidgeHead.empty(**{"width": 2, "labels": LABELS, **wrong})
    head = RidgeHead.empty(WIDTH, LABELS)
    with pytest.raises(HoldfastError, match="no label 'z'"):
        head.learn(STATES[:1], ["z"])
    for states, targets in ((STATES[:2], ["a"]), (STATES[:, :3], NAMES), (STATES / 0, NAMES)):
        with pytest.raises(HoldfastError, match="do not fit"):
            head.learn(states, targets)
    with pytest.raises(HoldfastError, match="by 'first'"):
        features(build_model(), [[0, 1]], "first")
    with pytest.raises(HoldfastError, match="only label"):
        RidgeHead.empty(2, ["a"]).forget_class("a", STATES[:1])
