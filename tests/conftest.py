"""Fixtures over the pieces of `tiny`."""

import copy

import pytest
import torch

from tiny import build_model, build_tokenizer, ticket_rows


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(tied=True, layers=2) gives a fresh copy of the same random model every time."""
    cache: dict[tuple[bool, int], torch.nn.Module] = {}

    def fresh(tied: bool = True, layers: int = 2):
        if (tied, layers) not in cache:
            cache[tied, layers] = build_model(tied, layers)
        return copy.deepcopy(cache[tied, layers])

    return fresh


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def rows():
    return ticket_rows()
