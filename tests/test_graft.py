"""A trained graft: its gradient against autograd, its ends, and a real mask that beats the largest changes alone."""

import copy
import json

import pytest
import torch

from cases import token_rows
from holdfast import models
from holdfast.errors import HoldfastError
from holdfast.runs.graft import Graft, graft, patch_of, score_gradient, soft, train
from tiny import build_model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_gradient_is_that_of_autograd():
    """A net of two layers whose weights are theta_0 + g tau."""
    start, tau = [draw(5, 4, seed=1), draw(3, 5, seed=2)], [draw(5, 4, seed=3), draw(3, 5, seed=4)]
    patch, scores = [t.abs() > 1 for t in tau], [torch.rand(t.shape, requires_grad=True) for t in tau]
    weights = [(w + soft(b, torch.sigmoid(s - 2.0)) * t) for w, t, b, s in zip(start, tau, patch, scores, strict=True)]
    for w in weights:
        w.retain_grad()
    (weights[1] @ torch.tanh(weights[0] @ draw(4, 6))).square().mean().backward()
    for w, t, b, s in zip(weights, tau, patch, scores, strict=True):
        mine = score_gradient(b, torch.sigmoid(s.detach() - 2.0), w.grad, t)
        torch.testing.assert_close(mine, s.grad, rtol=1e-5, atol=1e-8)


def test_the_first_patch_and_the_ends():
    taus = {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([[0.0, -2.0]])}
    assert {n: b.tolist() for n, b in patch_of(taus, 0.5).items()} == {"a": [True, False], "b": [[False, True]]}
    patch = torch.tensor([True, False])
    assert soft(patch, torch.zeros(2)).tolist() == [1.0, 0.0]  # S far below c: g = b
    assert soft(patch, torch.tensor([0.25, 0.25])).tolist() == [0.75, 0.25]


@pytest.fixture(scope="module")
def tuned(tokenizer, rows):
    """The base after a short real training, and the rows."""
    model, own = build_model(), token_rows(rows, tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    from holdfast.engine.forward import forward

    for _ in range(30):
        packed, logits = forward(model, own)
        torch.nn.functional.cross_entropy(logits, packed.target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, own


def test_a_trained_mask_is_no_worse_than_the_largest_changes(tuned):
    model, rows = tuned
    base = build_model()
    after = {n: p.detach() for n, p in model.named_parameters()}
    found = train(base, after, rows, share=0.02, steps=6, rate=3e5)
    assert len(found.losses) == 7 and min(found.losses) < found.losses[0]
    before = dict(build_model().named_parameters())
    for n, p in base.named_parameters():
        mask = found.masks.get(n, torch.zeros_like(p, dtype=torch.bool))
        torch.testing.assert_close(p, torch.where(mask, after[n], before[n]), atol=1e-6, rtol=1e-6)
    assert "model.embed_tokens.weight" not in found.masks and 0 < found.share < 0.5
    alone = train(build_model(), after, rows, share=0.02, steps=0)
    assert alone.share == pytest.approx(0.02, rel=0.02) and alone.losses == [found.losses[0]]


def test_the_share_counts_entries():
    masks = {"a": torch.tensor([True, False]), "b": torch.tensor([True, True])}
    assert Graft(masks, []).share == 0.75


def test_from_folders(tuned, tokenizer, tmp_path):
    for name, model in (("base", build_model()), ("tuned", copy.deepcopy(tuned[0]))):
        models.save_model(model, tokenizer, tmp_path / name, card=None)
    row = {"prompt": "Ticket: I was charged twice.\nQueue:", "completion": " billing"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    places = str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "rows.jsonl"
    found = graft(*places, tmp_path / "out", share=0.05, steps=2)
    got, _ = models.load(str(tmp_path / "out"), dtype="float32", device="cpu")
    moved = sum(int((p != build_model().get_parameter(n)).sum()) for n, p in got.named_parameters())
    assert 0 < moved <= sum(int(m.sum()) for m in found.masks.values())


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"steps": -1}, {"rate": 0.0}, {"rows": []}])
def test_what_makes_no_sense(tuned, wrong):
    after = {n: p.detach() for n, p in tuned[0].named_parameters()}
    with pytest.raises(HoldfastError, match="A graft was asked for"):
        train(build_model(), after, **{"rows": tuned[1], **wrong})
