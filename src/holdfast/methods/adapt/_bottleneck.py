"""A bottleneck beside or behind a part of a decoder block, and where such parts are."""

import re
from typing import Any

import torch
from torch import nn

from holdfast.engine.ways import inner
from holdfast.method import layer_of

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
SUBLAYERS = {"attention": r"(\w+_)?(attn|attention)", "feed-forward": r"(\w+_)?(mlp|ffn?|moe|feed_?forward)"}


class Bottleneck(nn.Module):
    """g(h) = U f(D h + b_d) + b_u, with D (k, d) from N(0, 0.01^2) and U (d, k), b_d, b_u zero: g is 0 at the start.

    Args:
        width: d. size: k. activation: f, by name. like: a tensor of the dtype and on the device that it gets.
    """

    def __init__(self, width: int, size: int, activation: str, like: torch.Tensor):
        super().__init__()
        how: Any = {"dtype": like.dtype, "device": like.device}
        self.down, self.up = nn.Linear(width, size, **how), nn.Linear(size, width, **how)
        self.activation = ACTIVATIONS[activation]()
        nn.init.normal_(self.down.weight, std=0.01)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.up(self.activation(self.down(h)))


def sublayer_of(model: Any, name: str, module: nn.Module) -> str:
    """ "attention" or "feed-forward" for a part of a decoder block, by its name; "" for any other module."""
    place, _, last = name.rpartition(".")
    if not place.rpartition(".")[2].isdigit() or layer_of(place) is None or "norm" in type(module).__name__.lower():
        return ""
    found = next((kind for kind, x in SUBLAYERS.items() if re.fullmatch(x, last)), "")
    return found if any(True for _ in module.parameters()) else ""


def width_of(model: Any) -> int:
    """D, of the states between blocks."""
    return int(inner(model).config.get_text_config().hidden_size)


def size_for(model: Any, reduction_factor: float) -> int:
    """k for a reduction of the width."""
    return max(1, int(width_of(model) / reduction_factor))


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The states that a part of a block was given."""
    return args[0] if args else kwargs["hidden_states"]


def with_states(out: Any, states: torch.Tensor) -> Any:
    """What a part of a block gave, with other states: some give a tuple that begins with them."""
    return (states, *out[1:]) if isinstance(out, tuple) else states


def states_of(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out
