"""Layer drift: CKA by its properties, and planted changes by their place."""

import pytest
import torch

from holdfast.diagnose import Case
from holdfast.diagnose.layer_drift import cka, compare_states, diagnose, stable_rank, weigh


def rows(n=80, d=12, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, d + 1)


@torch.no_grad()
def plant(model, part, size, seed=0):
    """Noise of `size` times each weight's norm."""
    torch.manual_seed(seed)
    for p in part.parameters():
        p.add_(torch.randn_like(p) * size * p.norm() / p.numel() ** 0.5)
    return model


def test_cka_is_invariant_to_rotation_and_scale_but_not_to_linear_maps():
    x, y = rows(), rows(seed=1)
    turn = torch.linalg.qr(rows(12, 12, 2))[0]
    assert cka(x, x) == pytest.approx(1, abs=1e-9)
    assert cka(x @ turn * 3 + 5, y) == pytest.approx(cka(x, y), abs=1e-5)
    assert cka(x, x @ turn) == pytest.approx(1, abs=1e-5)
    assert cka(x, x @ torch.diag(torch.arange(12, 0, -1) ** 2.0)) < 0.9


def test_cka_of_unrelated_rows_is_near_zero_although_rows_are_few():
    values = [cka(torch.randn(20, 60), torch.randn(20, 60)) for _ in range(30)]
    assert abs(sum(values) / 30) < 0.05  # the biased estimator gives about 0.75 here


def test_cka_is_the_unbiased_hsic_written_out():
    x, y = rows(9, 3), rows(9, 3, 1)

    def hsic(a, b):
        n, k, l = len(a), (a @ a.T).double().fill_diagonal_(0), (b @ b.T).double().fill_diagonal_(0)
        cross = 2 / (n - 2) * (k.sum(0) @ l.sum(0))
        return ((k @ l).trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - cross) / (n * (n - 3))

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert cka(x, y) == pytest.approx(float(expected), abs=1e-6)


def test_a_massive_dimension_is_left_out_of_the_second_cka():
    x, y = rows(), rows(seed=1)
    big = torch.randn(80) * 1e3
    x[:, 5], y[:, 5] = big, big
    found = compare_states(x, y)
    assert found["cka"] > 0.99 and found["cka_rest"] < 0.5


def test_stable_rank_counts_equal_directions():
    assert stable_rank(torch.eye(40)[:, :3] @ torch.eye(40)[:3]) == pytest.approx(3, abs=1e-3)
    assert stable_rank(torch.outer(torch.randn(30), torch.randn(20))) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_planted_layer_is_named(tiny_model, tokenizer, layer):
    tuned = tiny_model(layers=4)
    plant(tuned, tuned.model.layers[layer], 0.3)
    found = diagnose(Case(tiny_model(layers=4), tuned, tokenizer))
    assert f"sits in layer {layer}:" in found.finding
    states = {r[0]: r[3] for r in found.table[1:]}
    assert states["embeddings"] == "0.0 %" and states[f"layer {layer}"] != "0.0 %"
    assert all(states[f"layer {n}"] == "0.0 %" for n in range(layer))
    assert found.scores["kl"] > 0 and found.scores["drift"] > 0


def test_the_planted_module_and_the_embeddings_are_named(tiny_model, tokenizer):
    tuned = tiny_model()
    plant(tuned, tuned.model.layers[1].mlp.gate_proj, 1.0)
    assert "mlp.gate_proj" in diagnose(Case(tiny_model(), tuned, tokenizer)).finding
    tuned = tiny_model()
    plant(tuned, tuned.get_input_embeddings(), 1.0)
    assert "sits in embeddings" in diagnose(Case(tiny_model(), tuned, tokenizer)).finding


def test_small_even_noise_is_nothing_unusual_and_strong_noise_is(tiny_model, tokenizer):
    base = tiny_model(layers=4)
    quiet = diagnose(Case(base, plant(m := tiny_model(layers=4), m, 0.01), tokenizer))
    loud = diagnose(Case(base, plant(m := tiny_model(layers=4), m, 1.0), tokenizer))
    assert quiet.finding.startswith("Nothing unusual") and quiet.scores["cka"] > 0.99
    assert "far in all layers" in loud.finding and loud.scores["weights"] > 0.5


def test_an_adapter_drifts_as_its_merged_weights(tiny_model, tokenizer):
    tuned = tiny_model()
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    w = tuned.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        expected = 0.01 * float((b @ a).norm() / w.norm())
        w.add_(0.01 * b @ a)
    found = weigh(Case(tiny_model(), tuned, tokenizer)).modules[0, "self_attn.q_proj"]
    assert (found[0] / found[1]) ** 0.5 == pytest.approx(expected, rel=1e-5)
