"""The largest magnitudes of a tensor, against a stable sort."""

import pytest
import torch

from holdfast.engine.ranks import largest


def by_sort(x: torch.Tensor, count: int) -> torch.Tensor:
    taken = torch.zeros(x.numel(), dtype=torch.bool)
    taken[x.abs().flatten().sort(descending=True, stable=True).indices[: max(0, count)]] = True
    return taken.view_as(x)


@pytest.mark.parametrize("count", [-1, 0, 1, 7, 500, 999, 1000, 5000])
@pytest.mark.parametrize("kind", ["normal", "bf16", "few values", "zeros", "mostly zeros", "one bin"])
def test_the_entries_that_a_stable_sort_puts_first(kind, count):
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    x = {
        "normal": x,
        "bf16": x.bfloat16().float(),  # many equal magnitudes
        "few values": x.sign() * (x.abs() > 1),
        "zeros": torch.zeros_like(x),
        "mostly zeros": x * (x > 1.5),
        "one bin": 1 + x.abs() * 1e-6,
    }[kind]
    assert torch.equal(largest(x, count), by_sort(x, count))


def test_of_a_view_that_is_not_contiguous():
    x = torch.randn(30, 40).T[::2]
    assert torch.equal(largest(x, 77), by_sort(x, 77))


def test_infinite_and_no_numbers_come_first():
    x = torch.tensor([1.0, float("inf"), float("nan"), -2.0, 0.0])
    assert torch.equal(largest(x, 2), by_sort(x, 2))
