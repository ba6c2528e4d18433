"""A prefix: keys and values that every layer of a model finds before a row, where a soft prompt has embeddings.

It is one tensor (p, 2 L, H, D): p positions, keys and values of L layers in turn, H key heads of width D, as PEFT
keeps it and as a cache holds what the model computed for tokens (rotated keys). So a prefix computed of real tokens
does what these tokens do, which is how a model is tried before training.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from holdfast.engine.layout import upload
from holdfast.errors import ModelError


def is_prefix(soft: torch.Tensor | None) -> bool:
    """Whether what stands before the task's rows is keys and values, and not embeddings (p, D)."""
    return soft is not None and soft.ndim == 4


def cache_name(model: Any) -> str:
    """What `forward` of a transformers model calls its key/value cache: transformers is renaming it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def layers_of(prefix: torch.Tensor, count: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) of each layer, (count, H, p, D), the same for `count` rows."""
    each = prefix.to(dtype).permute(1, 2, 0, 3)[:, None].expand(-1, count, -1, -1, -1)
    return list(zip(each[0::2], each[1::2], strict=True))


def cache_of(prefix: torch.Tensor, count: int, dtype: torch.dtype) -> DynamicCache:
    """A cache that begins with the prefix, for `count` rows."""
    return DynamicCache(layers_of(prefix, count, dtype))


def behind(model: Any, prefix: torch.Tensor, wanted: Sequence[int], mask: torch.Tensor) -> dict[str, Any]:
    """What a forward of padded rows is given so that some of them are read behind the prefix.

    Args:
        model: the transformers model.
        wanted: for each row, how much of the prefix stands before it: all or none.
        mask: (B, L) 1 where a row has a token.
    """
    dtype = model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(mask.device.type):  # keys of the rows themselves are computed so
        dtype = torch.get_autocast_dtype(mask.device.type)
    has = upload(np.asarray(wanted, dtype=np.int64) > 0, mask.device)[:, None]
    before = has.to(mask.dtype).expand(-1, len(prefix))
    given: dict[str, Any] = {
        cache_name(model): cache_of(prefix, len(mask), dtype),
        "attention_mask": torch.cat([before, mask], dim=1),
    }
    if not all(wanted):
        places = torch.arange(mask.shape[1], device=mask.device)
        given["position_ids"] = places + len(prefix) * has.to(places.dtype)
    return given


def check_mode(model: Any) -> None:
    """Raise ModelError where gradient checkpointing would take the prefix away."""
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        what = "The task's rows are read behind keys and values of every layer, which gradient checkpointing drops."
        raise ModelError(what, "Set gradient_checkpointing: false, or use PromptTuning.")


@torch.no_grad()
def prefix_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """(p, 2 L, H, D) what a transformers model in eval mode keeps of these tokens.

    Raises:
        ModelError: it keeps no keys and values, or layers of different shapes.
    """
    given = torch.as_tensor(list(ids), device=next(model.parameters()).device)[None]
    name = cache_name(model)
    cache: Any = DynamicCache()
    try:
        model(input_ids=given, **{name: cache}, use_cache=True)
        kept = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return torch.stack([x[0].transpose(0, 1) for x in kept], dim=1)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as e:
        what = f"{type(model).__name__} does not keep equal keys and values in all layers ({type(e).__name__}: {e})."
        raise ModelError(what, "Use PromptTuning, whose prompt is embeddings.") from e
