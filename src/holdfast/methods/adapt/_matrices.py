"""The matrices inside of the layers: what methods that choose entries train of a model."""

from typing import Any

import torch

from holdfast.method import canonical, layer_of


def is_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether a parameter, by its canonical name, is one of them."""
    return p.ndim == 2 and layer_of(name) is not None


def only_matrices(model: Any) -> Any:
    """Freeze all else; returns the model."""
    for name, p in model.named_parameters():
        if not is_matrix(canonical(name), p):
            p.requires_grad_(False)
    return model
