"""AnchoredDecay: the pull by hand, and where weights end."""

import pytest
import torch

from cases import run
from holdfast.errors import PlanError
from holdfast.methods import AnchoredDecay, LoRA


def test_the_pull_by_hand():
    """theta0 = 1, theta = 3, the optimizer's step 0.5: 3.5 is 2.5 away; rate * alpha = 0.2 takes back 0.5."""
    state = {"base/w": torch.tensor([1.0]), "rate": torch.tensor(0.01)}
    step = AnchoredDecay(alpha=20.0).update("w", torch.tensor([0.5]), torch.tensor([3.0]), state)
    assert step.item() == pytest.approx(0.0, abs=1e-6)
    b = AnchoredDecay(alpha=20.0).update("q.lora_B.default.weight", torch.tensor([0.5]), torch.tensor([3.0]), state)
    assert b.item() == pytest.approx(0.5 - 0.2 * 3.5, rel=1e-5)


def test_a_pull_of_the_whole_way_is_the_base(tiny_model, tokenizer, rows):
    base = {n: p.detach().clone() for n, p in tiny_model().named_parameters()}
    got = run([AnchoredDecay(alpha=1e9)], tiny_model(), tokenizer, rows, 3)
    for n, w in base.items():
        torch.testing.assert_close(got.weights[n], w, rtol=0, atol=1e-6)


def test_one_step_of_adam_is_shortened_by_rate_times_alpha(tiny_model, tokenizer, rows):
    """The first step: no weight decay, so theta - theta0 is the step itself."""
    base = {n: p.detach().clone() for n, p in tiny_model().named_parameters()}
    same = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    one, plain = (run(plan, tiny_model(), tokenizer, rows, 1, **same) for plan in ([AnchoredDecay(alpha=300.0)], []))
    for n, w in base.items():
        torch.testing.assert_close(one.weights[n] - w, 0.7 * (plain.weights[n] - w), rtol=1e-3, atol=1e-7)


def test_on_an_adapter_the_whole_change_is_scaled(tiny_model, tokenizer, rows):
    same = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    lora = LoRA(r=3, lora_dropout=0.0)
    one, plain = (
        run(plan, tiny_model(), tokenizer, rows, 1, **same) for plan in ([lora, AnchoredDecay(alpha=300.0)], [lora])
    )
    for n, w in plain.weights.items():
        wanted = 0.7 * w if ".lora_B." in n else w
        torch.testing.assert_close(one.weights[n], wanted, rtol=1e-3, atol=1e-7)


def test_patterns_narrow_it(tiny_model, tokenizer, rows):
    base = {n: p.detach().clone() for n, p in tiny_model().named_parameters()}
    got = run([AnchoredDecay(alpha=1e9, patterns=("mlp",))], tiny_model(), tokenizer, rows, 2)
    for n, w in base.items():
        assert torch.allclose(got.weights[n], w, rtol=0, atol=1e-6) == ("mlp" in n), n


def test_negative_pull_is_refused():
    with pytest.raises(PlanError, match=r"AnchoredDecay\.alpha"):
        AnchoredDecay(alpha=-1.0).check(None)
