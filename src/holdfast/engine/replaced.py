"""Replaced modules: a module of a method's own in the place of one of the model's, which it keeps frozen inside.

Switched off it is the original and nothing else, so the base is one switch away, as it is below PEFT's adapters. What
it computes on the way it may hand out to its method's term; nothing of that stays on the module, and what gradient
checkpointing computes again in the backward is handed to nobody, so that it counts once.

Known limit: transformers' own `output_hidden_states` records by class, and so also what runs inside; the states of a
layer are those of `engine.forward.forward_states`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PretrainedConfig

ORIGINAL = "base_layer."  # begins the names of the original's parameters inside; PEFT calls it so too
Handed = dict[str, list[torch.Tensor]]  # key -> one tensor for each module that handed it out, in the order they ran
_ORIGIN = "_holdfast_origin"  # attribute of a transformers model, in no config and no state dict
_open: ContextVar[Handed | None] = ContextVar("handed", default=None)


class Replaced(nn.Module):
    """What `Method.replace` gives. A subclass makes what trains in `__init__` and overrides `changed`.

    base_layer: the original, which never trains; off: whether only that is run.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.base_layer, self.off = original, False

    def changed(self, *args: Any, **kwargs: Any) -> Any:
        """What stands in the place of `self.base_layer(*args, **kwargs)`, of the same shapes."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs) if self.off else self.changed(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Models read plain facts from their layers (`attention_type`); no weight of the original is passed off."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__.get("_modules", {}).get("base_layer"), name, None)
            if not isinstance(value, bool | int | float | str):
                raise
            return value

    def own_state(self) -> dict[str, torch.Tensor]:
        """Everything but the original, by name."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(ORIGINAL)}


def replaced_in(model: nn.Module) -> dict[str, Replaced]:
    """The replaced modules of a model by name, in its own order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Replaced)}


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything in the replaced modules that the base does not have, by name in the model."""
    return {f"{name}.{k}": v for name, m in replaced_in(model).items() for k, v in m.own_state().items()}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` stand in the place `name` of a model."""
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, module)


@dataclass(frozen=True)
class Origin:
    """Whose replaced modules a model holds: what is needed to make them again on the same base.

    method, settings: of the method; seed: of the run; base: a name for `models.resolve`; state: what the method had
    prepared.
    """

    method: str
    settings: dict[str, Any]
    seed: int
    base: str
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def origin_of(model: nn.Module) -> Origin:
    return model.__dict__[_ORIGIN]


def set_origin(model: nn.Module, origin: Origin | None) -> None:
    if origin is None:
        del model.__dict__[_ORIGIN]
    else:
        model.__dict__[_ORIGIN] = origin


# ---- the switch


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base, to the last bit, for the duration."""
    before = [(m, m.off) for m in replaced_in(model).values()]
    for m, _ in before:
        m.off = True
    try:
        yield
    finally:
        for m, off in before:
            m.off = off


# ---- handing out


def hand_out(key: str, value: torch.Tensor) -> None:
    """From inside a forward: (B, L, ...) or (B L, ...) numbers for each token of what the module was given."""
    into = _open.get()
    if into is not None:
        into.setdefault(key, []).append(value)


@contextmanager
def collecting() -> Iterator[Handed]:
    """What is handed out during one forward of a model."""
    found: Handed = {}
    token = _open.set(found)
    try:
        yield found
    finally:
        _open.reset(token)


# ---- copies that run beside the original


def copy_of(original: nn.Module) -> nn.Module:
    """A copy that shares the model's configuration: how attention is run is switched there, for all layers at once."""
    configs = [v for m in original.modules() for v in vars(m).values() if isinstance(v, PretrainedConfig)]
    return copy.deepcopy(original, {id(c): c for c in configs})


def set_cache_index(module: nn.Module, index: int) -> None:
    """Let the attention inside a copied layer keep its keys and values as layer `index` of a cache."""
    for m in module.modules():
        if isinstance(getattr(m, "layer_idx", None), int):
            m.layer_idx = index


def make_room(cache: Cache | None, original: int, index: int) -> None:
    """Give a cache a layer `index` of the kind of its layer `original`, which was not filled yet.

    A cache is a list of layers, made for the model's own. One more of them is reordered, cropped and reset with the
    others. Layers are added in the order the copies run, so indices count on from the model's last layer.

    Raises:
        RuntimeError: the cache was begun with the module switched off.
    """
    if cache is None or cache.layer_class_to_replicate is not None or len(cache.layers) > index:
        return
    fresh = copy.deepcopy(cache.layers[original])
    if getattr(fresh, "is_initialized", False):
        raise RuntimeError("This cache was begun with the replaced modules switched off: begin a new one.")
    assert len(cache.layers) == index, "a copy that runs earlier has a higher index"
    cache.layers.append(fresh)


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache a layer was given, under whichever name."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
