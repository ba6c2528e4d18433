"""More or less of what tuning added, at inference: both models' layers side by side on one state.

    x_{l+1} = x_l + PTC_l + a FTC_l,   PTC_l = f_base(x_l),  FTC_l = f_tuned(x_l) - f_base(x_l)
    f      what a layer adds to the state x_l; embeddings, final norm and head are the tuned model's

Nuti, Franzmeyer, Henriques, ICML 2025 (arXiv 2506.23423), the scaling that belongs to TuCo (`holdfast.diagnose.tuco`
measures that). a 1 is the tuned model, a 0 the base under the tuned embeddings, norm and head. The paper looks for a
between 0.75 and 1.25 on validation data; one a for all layers, and one for each is ours. It is not the line between
the weights (`WiSEFT`), nor an adapter scaled by a: the layers are not linear. They agree to first order in the change.

Cost: both models' layers in memory and at every token, and two sets of keys and values, both of the mixed states. The
base's lie behind the tuned model's in the same cache, so beams, drafts and crops work. It cannot be saved as a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from holdfast import models
from holdfast.engine import trial
from holdfast.engine.replaced import Replaced, cache_in, make_room, put, replaced_in, set_cache_index
from holdfast.engine.ways import blocks, inner
from holdfast.errors import ModelError


class Both(Replaced):
    """A tuned layer (`base_layer`; switched off it is alone) and the base's: `scale` of the way from one to the other.

    Args:
        layer: which layer of the model it is; cache: the layer of a cache that the base's one fills.
    """

    def __init__(self, tuned: nn.Module, base: nn.Module, layer: int, cache: int, scale: float):
        super().__init__(tuned)
        self.before, self.layer, self.cache, self.scale = base, layer, cache, scale
        set_cache_index(base, cache)
        for ours, theirs in zip(tuned.modules(), base.modules(), strict=True):  # attention is switched there for all
            vars(theirs).update({k: v for k, v in vars(ours).items() if isinstance(v, PretrainedConfig)})

    def changed(self, *args: Any, **kwargs: Any) -> Any:
        make_room(cache_in(args, kwargs), self.layer, self.cache)
        tuned, base = self.base_layer(*args, **kwargs), self.before(*args, **kwargs)
        if not isinstance(tuned, tuple):
            return torch.lerp(base, tuned, self.scale)
        return (torch.lerp(base[0], tuned[0], self.scale), *tuned[1:])


def scale_tuning(tuned: Any, base: Any, scale: float | Sequence[float] = 1.0) -> Any:
    """Put the base's layers beside the tuned ones, in place; returns `tuned`, for `generate` and everything else.

    Args:
        tuned: a model with plain layers (adapters merged); base: the model before tuning, which is used up.
        scale: a, or one for each layer; `set_scale` changes it.

    Raises:
        ModelError: the two models do not have the same layers, or share them.
    """
    ours, theirs = blocks(tuned), blocks(base)
    if [_shapes(m) for m in ours] != [_shapes(m) for m in theirs]:
        kinds = " and ".join(type(inner(m)).__name__ for m in (tuned, base))
        what = f"The layers of the two models ({kinds}) are not of the same shapes."
        raise ModelError(what, "Give the model that was tuned, adapters merged, and the one it was tuned from.")
    if any(a is b for a, b in zip(ours, theirs, strict=True)):
        raise ModelError("Base and tuned model are the same object.", "Load the base apart.")
    names = {id(m): n for n, m in tuned.named_modules()}
    for n, (after, before) in enumerate(zip(list(ours), list(theirs), strict=True)):
        device = next(after.parameters()).device
        both = Both(after, before.to(device).requires_grad_(False), n, len(ours) + n, 1.0)
        put(tuned, names[id(after)], both.train(after.training))
    set_scale(tuned, scale)
    trial.forget(tuned)
    return tuned


def set_scale(model: Any, scale: float | Sequence[float]) -> None:
    """Another a for a model of `scale_tuning`, or one for each of its layers.

    Raises:
        ModelError: the model is not one of these, or has another number of layers.
    """
    layers = [m for m in replaced_in(model).values() if isinstance(m, Both)]
    scales = [float(scale)] * len(layers) if isinstance(scale, int | float) else [float(a) for a in scale]
    if not layers or len(scales) != len(layers):
        what = f"There are {len(scales)} scales for a model with {len(layers)} layers of two."
        raise ModelError(what, "Give one number, or one for each layer, to a model of scale_tuning.")
    for layer, a in zip(layers, scales, strict=True):
        layer.scale = a


def load_scaled(tuned: str, base: str, scale: float | Sequence[float] = 1.0, **how: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of names or folders; `tuned` may be an adapter. `how`: as of `models.load`."""
    model, tokenizer = models.load(tuned, merge_adapter=True, **how)
    before, _ = models.load(base, merge_adapter=True, **how)
    return scale_tuning(model, before, scale), tokenizer


def _shapes(layer: nn.Module) -> tuple[Any, ...]:
    return type(layer), [(n, p.shape) for n, p in layer.named_parameters()]
