"""Entity tracking: the questions, what patching promises, a planted layer, and the words for scores by hand."""

import copy

import numpy as np
import pytest
import torch

from holdfast.diagnose import Case
from holdfast.diagnose.entities import attention_of, diagnose, patched, questions, run, told
from holdfast.errors import ModelError


@pytest.fixture(scope="module")
def asked(tokenizer):
    return questions(tokenizer, number=6)


def broken(base, layer):
    """A copy whose attention of one layer gives something else."""
    tuned = copy.deepcopy(base)
    weight = attention_of(tuned.model.layers[layer]).o_proj.weight
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return tuned


def test_the_right_thing_is_in_the_box_that_is_asked_for(asked, tokenizer):
    for q in asked:
        facts, _, rest = q.text.rpartition(". ")
        place = dict(reversed(f.lower().removeprefix("the ").split(" is in box ")) for f in facts.split(", "))
        letter = rest.removeprefix("Box ").removesuffix(" contains the").lower()
        first = tokenizer.decode([q.options[q.right]]).strip()
        assert len(place) == 4 and place[letter].startswith(first) and len(set(q.options)) == 4
        assert tokenizer.decode(q.ids, skip_special_tokens=True) == q.text
    assert {q.right for q in asked} > {0} and asked == questions(tokenizer, number=6)


@torch.no_grad()
def test_a_model_patched_into_itself_stays_and_all_layers_of_the_donor_are_the_donor(tiny_model, asked):
    base, q = tiny_model(), asked[0]
    score, own = run(base, q)
    assert run(base, q, own)[0] == pytest.approx(score, abs=1e-6)
    logits = base(torch.tensor([q.ids])).logits[0, -1]
    assert score == pytest.approx(float(logits[q.options].softmax(-1)[q.right]), abs=1e-6)
    assert not any(m._forward_hooks for m in base.modules())
    tuned = broken(broken(base, 0), 1)
    _, donor = run(base, q)
    assert run(tuned, q, donor)[0] == pytest.approx(
        score, abs=1e-5
    )  # only attention differs, and at the end it is read


@torch.no_grad()
def test_the_planted_layer_brings_all_back_and_the_other_nothing(tiny_model, asked):
    base = tiny_model()
    before, after, mixed = patched(base, broken(base, 1), asked)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(mixed[:, 1], before, atol=1e-5)
    np.testing.assert_allclose(mixed[:, 0], after, atol=1e-5)


def test_words_for_scores_by_hand():
    noise = np.tile([0.02, -0.02, 0.01, -0.01], 4)
    base, tuned = 0.9 + noise, 0.5 - noise
    mixed = np.stack([tuned + 0.01 * noise, tuned + 0.3 + noise, tuned], axis=1)
    found = told(base, tuned, mixed, 0.25)
    assert "attention of layer 1 brings most back: +0.30" in found.finding and found.scores["layer"] == 1
    assert "no single layer" in told(base, tuned, np.stack([tuned, tuned], axis=1), 0.25).finding
    assert told(base, base, mixed, 0.25).finding.startswith("Nothing unusual")
    assert told(0.25 + noise, tuned, mixed, 0.25).finding.startswith("Cannot tell")


def test_a_random_model_tracks_nothing(tiny_model, tokenizer):
    model = tiny_model()
    found = diagnose(Case(model, model, tokenizer))
    assert found.finding.startswith("Cannot tell") and len(found.table) == 3


def test_a_layer_without_attention_is_refused():
    with pytest.raises(ModelError, match="no part that is named as attention"):
        attention_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))
