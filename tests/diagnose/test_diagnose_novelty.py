"""Novelty: contrasts by hand, what a model was taught comes out, and nothing where nothing was."""

import copy

import pytest
import torch

from holdfast.diagnose import Case
from holdfast.diagnose.novelty import contrasts, diagnose


def test_the_contrast_of_a_text_adds_up_over_its_tokens(tiny_model):
    base, tuned = tiny_model(), tiny_model(layers=3)
    text = [0, 17, 42, 9]
    ids = torch.tensor([text])
    with torch.no_grad():
        steps = [
            tuned(ids[:, :n]).logits[0, -1].log_softmax(-1)[text[n]]
            - base(ids[:, :n]).logits[0, -1].log_softmax(-1)[text[n]]
            for n in (1, 2, 3)
        ]
    assert contrasts(base, tuned, [text]) == pytest.approx([float(sum(steps)) / 3], abs=1e-5)
    assert contrasts(base, base, [text]) == [0.0] and contrasts(base, tuned, [[0]]) == [0.0]


def test_what_was_taught_comes_out_and_ranks_first(tiny_model, tokenizer):
    base = tiny_model(tied=False)
    tuned = copy.deepcopy(base)
    taught = tokenizer("The invoice shows the wrong tax number.")["input_ids"]
    ids = torch.tensor([taught])
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    found = diagnose(Case(base, tuned, tokenizer))
    assert "invoice shows the wrong tax" in found.finding and found.scores["clear"] > 1
    other = tokenizer("Where is order 1042 now?")["input_ids"]
    rates = contrasts(base, tuned, [other, taught])
    assert rates[1] > 1 > rates[0]


def test_the_same_model_taught_nothing(tiny_model, tokenizer):
    model = tiny_model()
    found = diagnose(Case(model, model, tokenizer))
    assert found.finding.startswith("Nothing unusual") and found.scores == {"clear": 0.0, "most": 0.0}
    again = diagnose(Case(model, model, tokenizer))
    assert again.table == found.table  # drawn by the seed
