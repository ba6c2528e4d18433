"""DGHard: of a change the directions above the noise stay."""

import pytest
import torch

from holdfast.errors import PlanError
from holdfast.methods import DGHard
from holdfast.methods.merge.dg_hard import omega
from holdfast.services import Context


def merged(method, change, base=None):
    base = torch.zeros_like(change) if base is None else base
    return method.merge("w", {"base": base, "tuned": base + change}, {}, 1)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_hand_value():
    # diag(9, 1, 2): singular values 9, 2, 1 with median 2; omega(1) = 0.56 - 0.95 + 1.82 + 1.43 = 2.86;
    # the threshold is 5.72, and 9 alone stays. With strength 0.3 it is 1.716: 9 and 2 stay.
    change, base = torch.diag(torch.tensor([9.0, 1.0, 2.0])), noise(3, 3)
    assert omega(1.0) == pytest.approx(2.86)
    got = merged(DGHard(), change, base) - base
    torch.testing.assert_close(got, torch.diag(torch.tensor([9.0, 0.0, 0.0])), atol=1e-5, rtol=0)
    got = merged(DGHard(strength=0.3), change, base) - base
    torch.testing.assert_close(got, torch.diag(torch.tensor([9.0, 0.0, 2.0])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(60, 200), (200, 60)])
def test_noise_goes_and_a_signal_stays_with_its_rank(shape):
    assert int(torch.linalg.matrix_rank(merged(DGHard(), noise(*shape)))) <= 1
    signal = 5 * noise(shape[0], 3, seed=1) @ noise(3, shape[1], seed=2)
    kept = merged(DGHard(), signal + noise(*shape))
    assert int(torch.linalg.matrix_rank(kept, rtol=1e-5)) == 3
    assert torch.linalg.vector_norm(kept - signal) < 0.1 * torch.linalg.vector_norm(signal)


def test_a_stack_is_cut_matrix_by_matrix():
    stack = torch.stack([noise(20, 30), 5 * noise(20, 1, seed=1) @ noise(1, 30, seed=2) + noise(20, 30)])
    got = merged(DGHard(), stack)
    for whole, alone in zip(got, stack, strict=True):
        torch.testing.assert_close(whole, merged(DGHard(), alone))


def test_a_low_rank_change_and_vectors_stay():
    low = noise(30, 2) @ noise(2, 40, seed=1)
    torch.testing.assert_close(merged(DGHard(), low), low, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged(DGHard(), noise(9)), noise(9))
    assert not merged(DGHard(vectors=False), noise(9)).any()


def test_the_control_has_the_norm_of_the_repair_and_the_direction_of_the_change():
    change = noise(30, 40) + 3 * noise(30, 1, seed=1) @ noise(1, 40, seed=2)
    repaired, control = merged(DGHard(), change), merged(DGHard(control=True), change)
    assert control.norm().item() == pytest.approx(repaired.norm().item(), rel=1e-5) and control.norm() < change.norm()
    torch.testing.assert_close(control / control.norm(), change / change.norm())


def test_a_threshold_below_0_is_refused(tiny_model, tokenizer):
    with pytest.raises(PlanError, match=r"DGHard\.strength"):
        DGHard(strength=-1.0).check(Context(tiny_model(), tokenizer))
