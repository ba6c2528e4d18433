"""An adapter and the one that healed it as one adapter of both ranks: who trains an adapter is handed one.

    W + s1 B1 A1 + s2 B2 A2  =  W + [s1 B1, s2 B2] [A1; A2]

PEFT's own `add_weighted_adapter(combination_type="cat")` does the same for adapters of one model; these two have
different bases, and may stand beside different maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from holdfast.method import canonical
from holdfast.models.merging import peft_quiet

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # canonical name of a map -> A (r, n), s B (m, r)


def joined(model: Any, healing: Any) -> Any | None:
    """The base of `model` with one adapter for its own and that of `healing`; None where they are more than s B A.

    Both are wrapped by PEFT, and `model` is used up unless None comes back.
    """
    from peft import LoraConfig, get_peft_model

    own, other = factors(model), factors(healing)
    if own is None or other is None:
        return None
    both = {name: _sum(own.get(name), other.get(name)) for name in [*own, *(n for n in other if n not in own)]}
    rank = max(len(a) for a, _ in both.values())
    task = model.peft_config[model.active_adapter].task_type
    with peft_quiet():
        base = model.unload()
        targets = [n for n, _ in base.named_modules() if canonical(n) in both]
        out = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type=task))
    with torch.no_grad():
        for name, m in lora_layers(out).items():
            a, b = both[name]
            own_a, own_b = m.lora_A["default"].weight, m.lora_B["default"].weight
            own_a.zero_()[: len(a)].copy_(a)
            own_b.zero_()[:, : len(a)].copy_(b)
    return out.requires_grad_(False).eval()


def factors(model: Any) -> Factors | None:
    """A and s B of each map of a model with one adapter; None for no adapter, or one that is more than that."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[model.active_adapter]
    if config.peft_type != "LORA" or config.modules_to_save or config.bias != "none":
        return None
    found = {}
    for name, m in lora_layers(model).items():
        if not _is_plain(m):
            return None
        (adapter,) = m.active_adapters
        a, b = m.lora_A[adapter].weight, m.lora_B[adapter].weight
        found[name] = (a.detach().float(), m.scaling[adapter] * b.detach().float())
    return found or None


def _is_plain(m: Any) -> bool:
    """Whether a layer is s B A beside one linear map: no DoRA, no bias, no embedding, no experts in one tensor."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    if type(m) is not Linear or not isinstance(m.get_base_layer(), (torch.nn.Linear, Conv1D)):
        return False
    (adapter,) = m.active_adapters
    return adapter in m.lora_A and not m.use_dora.get(adapter) and not m.lora_bias.get(adapter)


def lora_layers(model: Any) -> dict[str, Any]:
    """Every LoRA layer of a wrapped model, whatever it stands beside, by the name that this had in the plain one."""
    from peft.tuners.lora import LoraLayer

    return {canonical(n): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def _sum(*parts: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
    there = [p for p in parts if p is not None]
    return torch.cat([a for a, _ in there]), torch.cat([b for _, b in there], dim=1)
