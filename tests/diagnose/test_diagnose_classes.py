"""Class separability: measures by hand, planted classes that draw together, and none where nothing changed."""

import numpy as np
import pytest
import torch

from holdfast.diagnose import Case
from holdfast.diagnose.classes import apart, compare, diagnose, fisher
from holdfast.measure.tasks import Task


def test_measures_by_hand():
    # classes at -1, -3 and 1, 3: means -2 and 2, so 4 * 2^2 = 16 between; each point is 1 away from its own: 4
    points, labels = np.array([[-3.0], [-1.0], [1.0], [3.0]]), np.array(["a", "a", "b", "b"])
    assert fisher(points, labels) == pytest.approx(4.0)
    # two tight pairs in different directions: every neighbour is a fellow, unless the labels cross
    four = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    assert apart(four, ["a", "a", "b", "b"]).near.tolist() == [1, 1, 1, 1]
    assert apart(four, ["a", "b", "a", "b"]).near.tolist() == [0, 0, 0, 0]
    assert (
        apart(four, ["a", "a", "b", "b"]).score
        > apart(np.random.default_rng(0).normal(size=(4, 9)), list("aabb")).score
    )


def test_scale_and_rotation_do_not_matter():
    points, labels = np.random.default_rng(0).normal(size=(12, 5)), list("aaaabbbbcccc")
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    one, other = apart(points, labels), apart(3 * points @ turn, labels)
    assert one.near.tolist() == other.near.tolist() and one.fisher == pytest.approx(other.fisher)
    assert one.score == pytest.approx(other.score)


def planted(tiny_model):
    """A base in which the words of two classes have embeddings of their own; and one that takes them away."""
    base = tiny_model(tied=False)
    tuned = tiny_model(tied=False)
    with torch.no_grad():
        for m in (base, tuned):
            for p in m.model.layers.parameters():
                p.zero_()  # states are embeddings
    return base, tuned


def test_classes_that_drew_together_are_named(tiny_model, tokenizer):
    base, tuned = planted(tiny_model)
    letters = [c for c in "bcdfghjklmnp"]
    ids = {c: tokenizer(f"{c}", add_special_tokens=False)["input_ids"][0] for c in letters}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, c in enumerate(letters):
            noise = 0.1 * torch.randn(32, generator=draw)
            base.model.embed_tokens.weight[ids[c]] = noise + (5.0 if n % 2 else -5.0) * torch.eye(32)[0]
            tuned.model.embed_tokens.weight[ids[c]] = noise
    items = tuple((c * 3, "odd" if n % 2 else "even") for n, c in enumerate(letters))
    task = Task("letters", 1, "made", "", "x", "y", ("odd", "even"), items)
    found = compare(Case(base, tuned, tokenizer), [task])
    assert "have drawn together" in found.finding and "letters" in found.finding
    assert found.scores["base"] == 1.0 and found.scores["change"] < -0.2


def test_the_same_model_is_nothing_unusual(tiny_model, tokenizer):
    model = tiny_model()
    found = diagnose(Case(model, model, tokenizer))
    assert found.finding.startswith("Nothing unusual") and found.scores["change"] == 0.0 and len(found.table) == 5
