"""The linear maps of a decoder block by what they do, whatever an architecture calls them."""

import copy
import re
from typing import Any

import torch
from torch import nn

from holdfast.engine.ways import inner
from holdfast.method import layer_of
from holdfast.methods.adapt._adapter import why_unfit

ATTENTION = {"q": r"(q_proj|q_lin|query)$", "k": r"(k_proj|k_lin|key)$", "v": r"(v_proj|v_lin|value)$",
             "o": r"(o_proj|out_proj|out_lin)$"}  # fmt: skip
FEED_FORWARD = {"gate": r"(gate_proj|w1)$", "up": r"(up_proj|fc1|w3)$", "down": r"(down_proj|fc2|w2)$"}


def part_of(name: str) -> str:
    """What a module of that name is, "q" to "o" or "gate" to "down"; "" for anything else, fused maps too."""
    known = {**ATTENTION, **FEED_FORWARD}
    return next((part for part, x in known.items() if re.fullmatch(x, name.rpartition(".")[2])), "")


def is_map(model: Any, name: str, module: nn.Module) -> bool:
    """Whether a module is a linear map inside of a block, beside which something can stand."""
    if layer_of(f"{name}.weight") is None or not isinstance(module, nn.Linear):
        return False
    place, _, last = name.rpartition(".")
    return not why_unfit(inner(model).get_submodule(place), last, module)


@torch.no_grad()
def with_weight(original: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """The same map with another weight, and bias where one is given, in the original's dtype."""
    plain = copy.deepcopy(original)
    plain.weight = nn.Parameter(weight.to(original.weight.dtype))
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(original.weight.dtype))
    return plain
