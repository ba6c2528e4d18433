"""How far weights are from the base's: dense ones by subtraction, an adapter's by multiplying it out."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from holdfast.engine.shards import whole
from holdfast.method import canonical
from holdfast.services import View


def lora_pairs(view: View) -> list[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """(name, A (r, n), B (m, r), scale) of every LoRA module whose A or B trains."""
    return [(name, a, b, scale) for name, _, a, b, scale in _loras(view)]


def changes(view: View, patterns: Sequence[str] = ()) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """(name of a weight of the base, what computes its change with gradient) for all that trains.

    A change has the weight's shape; under FSDP2 that of a dense weight is cut over processes, an adapter's is whole.
    """
    for name, p in view.params.items():
        if ".lora_" not in name and name in view.base_weights and wanted(name, patterns):
            yield name, lambda p=p, w=view.base_weights[name]: p - w.to(p.dtype)
    loras = _loras(view)
    names = {id(p): canonical(n).replace(".base_layer.", ".") for n, p in view.model.named_parameters() if loras}
    for _, module, a, b, scale in loras:
        name = names[id(module.get_base_layer().weight)]  # of a tied weight the first, as `prepare` names it
        turned = hasattr(module, "lora_embedding_A") and "default" in module.lora_embedding_A
        turned = turned or getattr(module, "fan_in_fan_out", False)
        if wanted(name, patterns):
            yield name, lambda a=a, b=b, s=scale, turned=turned: s * ((b @ a).T if turned else b @ a)


def wanted(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns finds the name; () is all."""
    return not patterns or any(re.search(x, name) for x in patterns)


def _loras(view: View) -> list[tuple[str, Any, torch.Tensor, torch.Tensor, float]]:
    """(name, module, A, B, scale)."""
    out = []
    module: Any  # PEFT's layers: torch's types know no lora_A
    for name, module in view.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            keys = ("lora_A.default.weight", "lora_B.default.weight")
        elif hasattr(module, "lora_embedding_A") and "default" in module.lora_embedding_A:
            keys = ("lora_embedding_A.default", "lora_embedding_B.default")
        else:
            continue
        a, b = (whole(_trained(view, f"{name}.{k}")) for k in keys)
        if a.requires_grad or b.requires_grad:
            out.append((name, module, a, b, float(module.scaling["default"])))
    return out


def _trained(view: View, name: str) -> torch.Tensor:
    """A parameter of the model as it is trained: while FSDP2 computes, the model holds gathered copies."""
    return view.params.get(canonical(name), view.model.get_parameter(name))
