"""Contrast: values by hand, its limits, and real generation."""

import pytest
import torch

from holdfast.decode import Contrast
from holdfast.decode.contrast import contrasted
from holdfast.errors import HoldfastError
from tiny import build_model

PROMPT = torch.tensor([[0, 17, 42]])


def test_hand_value():
    # tuned (.5, .4, .1), base (.6, .2, .2): only tokens of at least .5 * .5 = .25 are plausible.
    got = contrasted(torch.tensor([0.5, 0.4, 0.1]).log(), torch.tensor([0.6, 0.2, 0.2]).log(), alpha=0.5)
    assert got[:2].exp().tolist() == pytest.approx([5 / 6, 2.0]) and got[2] == -torch.inf


def test_equal_models_differ_nowhere_and_the_plausible_set_is_never_empty():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    got = contrasted(logits, logits, 0.1)
    assert bool((got[got.isfinite()] == 0).all()) and bool(got.isfinite().any(-1).all())
    greedy = contrasted(logits, logits.flip(1), 1.0)
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and bool((greedy.isfinite().sum(-1) == 1).all())


@torch.no_grad()
def test_generates_what_the_two_models_say():
    tuned, base = build_model(seed=1), build_model(seed=2)
    got = tuned.generate(
        PROMPT, logits_processor=[Contrast(base, 0.5)], do_sample=False, max_new_tokens=10, eos_token_id=None
    )
    wanted = contrasted(tuned(got).logits, base(got).logits, 0.5).argmax(-1)
    assert got[0, 3:].tolist() == wanted[0, 2:-1].tolist()


def test_values_that_make_no_sense():
    with pytest.raises(HoldfastError, match="alpha is 0"):
        Contrast(build_model(), alpha=0)
