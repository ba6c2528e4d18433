"""Intruders: the count on matrices with known directions, and a planted spike beside its control."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from holdfast.diagnose import Case, intruder
from holdfast.diagnose.intruder import control, diagnose, left_vectors, spectrum


def matrix(m, n, seed=0):
    """Known singular values n, n-1, ... in random directions."""
    draw = torch.Generator().manual_seed(seed)
    r = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(d, r, generator=draw, dtype=torch.float64))[0] for d in (m, n))
    return (u * torch.arange(r, 0, -1)) @ v.T, u, v


@torch.no_grad()
def spike(w, size=3.0, out=None):
    """Add a rank-1 update whose output direction is spread evenly over all left singular vectors of w (m, n)."""
    u, s, v = torch.linalg.svd(w.detach(), full_matrices=False)
    direction = u.sum(1) / u.shape[1] ** 0.5 if out is None else out
    w.add_(size * s[0] * torch.outer(direction, v[-1]))


@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30)])
@pytest.mark.parametrize("k", [None, 11])
def test_left_vectors_are_those_of_the_svd(shape, k):
    w, _, _ = matrix(*shape)
    expected, values, _ = torch.linalg.svd(w, full_matrices=False)
    u, s = left_vectors(w, k)
    n = k or min(shape)
    torch.testing.assert_close(s, values[:n])
    torch.testing.assert_close((u.T @ expected[:, :n]).abs(), torch.eye(n, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30)])
def test_known_directions_are_counted(shape):
    w, u, v = matrix(*shape)
    u0, _ = left_vectors(w)
    assert spectrum(u0, w).intruders == 0 and spectrum(u0, w).nearest == pytest.approx(1)
    spread = u.sum(1) / u.shape[1] ** 0.5
    seen = spectrum(u0, w + 200 * torch.outer(spread, v[:, -1]))
    assert seen.intruders == 1 and seen.nearest < 0.3 and seen.energy > 0.7
    assert spectrum(u0, w + 200 * torch.outer(u[:, 7], v[:, -1])).intruders == 0  # a direction the base has


def test_gap_shows_exchangeable_directions():
    flat, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    assert spectrum(flat, flat).gap == pytest.approx(0, abs=1e-9)
    assert spectrum(*(matrix(20, 20)[i] for i in (1, 0))).gap == pytest.approx(1 / 20)


def test_control_has_the_norm_of_the_change_and_its_seed():
    change = torch.randn(6, 9)
    assert float(control(change, 1).norm()) == pytest.approx(float(change.norm()), rel=1e-5)
    assert torch.equal(control(change, 1), control(change, 1)) and not torch.equal(
        control(change, 1), control(change, 2)
    )


@torch.no_grad()
def trained_like():
    """A model of width 128 whose weights have well separated directions, as trained ones have."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes))
    for layer in model.model.layers:
        for m in layer.modules():
            if isinstance(m, torch.nn.Linear):
                _, u, v = matrix(*m.weight.shape)
                m.weight.copy_((u / (1 + torch.arange(u.shape[1]) / 5)) @ v.T)
    return model


def test_a_planted_spike_is_found_and_its_random_control_has_none(tokenizer):
    base, tuned = trained_like(), trained_like()
    spike(tuned.model.layers[1].self_attn.o_proj.weight, 1.5)
    found = diagnose(Case(base, tuned, tokenizer))
    assert found.finding.startswith("1 intruder dimension beyond chance") and "layer 1;" in found.finding
    assert "model.layers.1.self_attn.o_proj.weight" in found.finding
    assert found.scores == {"intruders": 1.0, "control": 0.0, "clear matrices": 1.0, "matrices": 1.0}


def test_the_control_itself_is_nothing_unusual(tiny_model, tokenizer):
    base = tiny_model(layers=3)  # random weights: flat spectra, where noise alone turns directions
    for seed in range(5):
        tuned = tiny_model(layers=3)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(torch.randn_like(p) * 0.3 * p.std())
        found = diagnose(Case(base, tuned, tokenizer, seed=seed))
        assert found.scores["intruders"] > 0 and found.finding.startswith("Nothing unusual")


def test_above_the_budget_the_strongest_directions_are_taken(tokenizer, monkeypatch):
    tuned = trained_like()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 1e-4)
    spike(tuned.model.layers[2].mlp.up_proj.weight, 1.5)
    monkeypatch.setattr(intruder, "BUDGET", 0)
    found = diagnose(Case(trained_like(), tuned, tokenizer))
    assert found.scores["matrices"] == 4 and "the 4 with" in found.detail and "of 21 changed" in found.detail
    assert "model.layers.2.mlp.up_proj.weight" in found.finding


def test_transposed_layers_are_turned(tokenizer):
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    base, tuned = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    with torch.no_grad():
        base.transformer.h[0].mlp.c_proj.weight.copy_(matrix(32, 128)[0].T * 0.01)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        spike(tuned.transformer.h[0].mlp.c_proj.weight.T, 1.0)
    assert diagnose(Case(base, tuned, tokenizer)).scores["intruders"] == 1
