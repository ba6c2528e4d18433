"""Novelty: contrasts by hand, what a model was taught comes out, and nothing where nothing was."""

import copy

import pytest
import torch

from holdfast.diagnose import Case
from holdfast.diagnose.novelty import contrasts, diagnose, iterated
from holdfast.diagnose.revival import briefly_tuned
from holdfast.engine.pack import token_row


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


def taught(base, tokenizer, *texts):
    """A copy of a model after a real training on some texts."""
    tuned, rows = copy.deepcopy(base), [torch.tensor([tokenizer(t)["input_ids"]]) for t in texts]
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        for ids in rows:
            tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return tuned


def test_what_was_taught_comes_out_and_ranks_first(tiny_model, tokenizer):
    base = tiny_model(tied=False)
    text = "The invoice shows the wrong tax number."
    tuned = taught(base, tokenizer, text)
    found = diagnose(Case(base, tuned, tokenizer))
    assert "invoice shows the wrong tax" in found.finding and found.scores["clear"] > 1
    rates = contrasts(base, tuned, [tokenizer(t)["input_ids"] for t in ("Where is order 1042 now?", text)])
    assert rates[1] > 1 > rates[0]


def test_what_was_found_is_less_new_in_the_next_round(tiny_model, tokenizer):
    base = tiny_model(tied=False)
    before = copy.deepcopy(base.state_dict())
    case = Case(base, taught(base, tokenizer, "The invoice shows the wrong tax number.", "Where is it?"), tokenizer)
    first, second = iterated(case, rounds=2, learning_rate=3e-2)
    assert first and second and first != second
    assert all(torch.equal(w, before[n]) for n, w in base.state_dict().items())
    with briefly_tuned(base, tokenizer, [token_row(t, 1) for t in first], 0, 3e-2) as changed, torch.no_grad():
        after = contrasts(changed, case.tuned, first)
    assert all(now < was for now, was in zip(after, contrasts(base, case.tuned, first), strict=True))


def test_the_same_model_taught_nothing(tiny_model, tokenizer):
    model = tiny_model()
    found = diagnose(Case(model, model, tokenizer))
    assert found.finding.startswith("Nothing unusual") and found.scores == {"clear": 0.0, "most": 0.0}
    again = diagnose(Case(model, model, tokenizer))
    assert again.table == found.table  # drawn by the seed
