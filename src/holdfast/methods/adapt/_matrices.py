"""The matrices inside of the layers: what methods that choose entries train of a model."""

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

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


def of_few_bits(module: Any) -> bool:
    """Whether the weights of a linear map are packed into 4 or 8 bits."""
    return not module.weight.is_floating_point() or getattr(module.weight, "quant_state", None) is not None


def inputs_of(module: Any) -> int:
    """How wide the inputs of a linear map are; of packed weights no shape says it."""
    return int(module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features)
