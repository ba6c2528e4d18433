"""Safety subspaces: projections and overlaps by hand, random sets by chance, and planted changes."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from holdfast.diagnose import Case, run
from holdfast.diagnose.subspaces import diagnose, left, main, mso, parallel, projected
from holdfast.errors import ModelError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_projection_by_hand():
    # alignment changed the first row most: of two directions the first half is (1, 0)
    alignment, change = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert parallel(change, alignment, 0.5).tolist() == [[1.0, 2.0], [0.0, 0.0]]
    torch.testing.assert_close(parallel(change, alignment, 1.0), change)
    orth = change - parallel(change, alignment, 0.5)
    torch.testing.assert_close(parallel(change, alignment, 0.5) + orth, change)


def test_overlaps_by_hand_and_by_chance():
    eye = torch.eye(4, dtype=torch.float64)
    assert mso(eye[:, :2], eye[:, :2]) == (1.0, 0.5) and mso(eye[:, :2], eye[:, 2:]) == (0.0, 0.5)
    assert mso(eye[:, :1], eye[:, :3]) == (1.0, 0.75)
    u, s = left(draw(30, 8))
    assert main(u, s, 1.0).shape == (30, 8) and main(u, torch.tensor([3.0, 1.0, 1.0, 1.0]), 0.75).shape == (30, 1)
    mixed = left(u @ draw(8, 8, seed=1))[0]  # the same span, other vectors
    assert mso(u, mixed)[0] == pytest.approx(1.0)
    found = [mso(left(draw(60, 6, seed=n))[0], left(draw(60, 3, seed=n + 100))[0])[0] for n in range(40)]
    assert sum(found) / 40 == pytest.approx(0.1, abs=0.02)


def three(tiny_model, along):
    """Ancestor, base and tuned: alignment of rank 1 in every matrix, tuning along the same or at random."""
    ancestor = tiny_model(layers=3)
    base, tuned = copy.deepcopy(ancestor), copy.deepcopy(ancestor)
    with torch.no_grad():
        for n, (p, q) in enumerate(zip(base.model.layers.parameters(), tuned.model.layers.parameters(), strict=True)):
            if p.ndim == 2:
                u = draw(len(p), 1, seed=n).float()
                p.add_(0.05 * u @ draw(1, p.shape[1], seed=n + 500).float())
                q.copy_(p)
                other = draw(1, p.shape[1], seed=n + 900).float()
                q.add_(0.01 * (u @ other if along else draw(*p.shape, seed=n + 900).float()))
    return ancestor, base, tuned


def test_a_change_along_the_alignment_is_told_and_a_random_one_is_not(tiny_model, tokenizer):
    ancestor, base, tuned = three(tiny_model, along=True)
    found = diagnose(Case(base, tuned, tokenizer, ancestor=ancestor))
    assert "where alignment had" in found.finding and found.scores["inside"] == pytest.approx(1.0, abs=1e-3)
    assert len(found.table) == 13 and found.scores["mso"] == pytest.approx(1.0, abs=1e-3)
    ancestor, base, tuned = three(tiny_model, along=False)
    found = diagnose(Case(base, tuned, tokenizer, ancestor=ancestor))
    assert found.finding.startswith("Nothing unusual") and 0.5 < found.scores["times"] < 2


def test_weights_that_are_stored_turned_are_read_by_what_they_write(tokenizer):
    """GPT-2 stores (in, out): alignment and tuning write along one direction and read along others."""
    config = GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    ancestor = GPT2LMHeadModel(config).eval()
    base, tuned = copy.deepcopy(ancestor), copy.deepcopy(ancestor)
    with torch.no_grad():
        for n, (p, q) in enumerate(
            zip(base.transformer.h.parameters(), tuned.transformer.h.parameters(), strict=True)
        ):
            if p.ndim == 2:
                out = draw(1, p.shape[1], seed=n).float()
                p.add_(0.05 * draw(len(p), 1, seed=n + 500).float() @ out)
                q.copy_(p + 0.01 * draw(len(p), 1, seed=n + 900).float() @ out)
    found = diagnose(Case(base, tuned, tokenizer, ancestor=ancestor))
    assert found.scores["inside"] == pytest.approx(1.0, abs=1e-3)
    into = copy.deepcopy(tuned)
    projected(Case(base, tuned, tokenizer, ancestor=ancestor), 0.1, into)
    for p, q in zip(into.transformer.h.parameters(), tuned.transformer.h.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_the_whole_projection_is_the_tuned_model(tiny_model, tokenizer):
    ancestor, base, tuned = three(tiny_model, along=True)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.01 * draw(*p.shape, seed=3).float())  # alignment of full rank
    case, into = Case(base, tuned, tokenizer, ancestor=ancestor), copy.deepcopy(tuned)
    projected(case, 1.0, into)
    for (name, p), q in zip(into.named_parameters(), tuned.parameters(), strict=True):
        wide = p.ndim == 2 and p.shape[0] <= p.shape[1]  # its left directions are all there
        if wide or p.ndim == 1:
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=name)


def test_an_ancestor_of_other_embeddings(tiny_model, tokenizer):
    """Instruct models often have more tokens than what they were tuned from: the layers are compared all the same."""
    ancestor, base, tuned = three(tiny_model, along=True)
    ancestor.resize_token_embeddings(408)
    assert "where alignment had" in diagnose(Case(base, tuned, tokenizer, ancestor=ancestor)).finding
    with pytest.raises(ModelError, match=r"Ancestor and base differ in the parameter 'model\.layers\.2"):
        diagnose(Case(base, tuned, tokenizer, ancestor=tiny_model(layers=2)))


def test_no_alignment_has_no_directions():
    assert not parallel(draw(4, 3), torch.zeros(4, 3), 0.5).any()


def test_without_a_third_model_it_says_so(tiny_model, tokenizer):
    model = tiny_model()
    (found,) = run(Case(model, model, tokenizer), ["safety subspaces"])
    assert found.finding.startswith("Not made: It compares three models") and "--ancestor" in found.detail
    found = diagnose(Case(model, model, tokenizer, ancestor=model))
    assert found.finding.startswith("Nothing unusual")
