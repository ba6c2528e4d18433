"""After training: one tensor at a time, its base, what was trained, and whatever other models a method names.

Methods work in plan order, each on what the one before made. A method that must rank over the whole model is shown all
tensors once before (`survey`); what it gives stands in its state when it merges. Other models are read from the disk
tensor by tensor, so no second model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast import models
from holdfast.engine.shards import cut_like, whole
from holdfast.errors import HoldfastError
from holdfast.method import Method, State, canonical
from holdfast.models.related import check_related
from holdfast.models.source import ModelSource
from holdfast.models.tensors import Adapted, Saved, tensors_of
from holdfast.recipe import locate

Weights = Mapping[str, torch.Tensor]
OWN = ("base", "tuned")


def sources_of(method: Method, base_dir: Any) -> dict[str, ModelSource]:
    """The other models of a method by role, resolved; a relative path is looked for beside the recipe first."""
    found = {}
    for role, name in method.others().items():
        assert role not in OWN, f"{method.name} calls another model {role!r}"
        place = locate(name, base_dir or Path.cwd()) if name else None
        try:
            found[role] = models.resolve(str(place or name))
        except HoldfastError as e:
            raise type(e)(f"{method.name} cannot merge another model: {e.what}", e.cure) from e
    return found


def check_others(method: Method, ctx: Any, weights: Weights | None = None) -> None:
    """Raise HoldfastError for another model of `method` that cannot be merged with the base of `ctx`.

    weights: of the base, where `ctx.model` holds none.
    """
    for source in sources_of(method, ctx.base_dir).values():
        try:
            check_related(source, ctx.model, ctx.tokenizer, weights)
        except HoldfastError as e:
            raise type(e)(f"{method.name} cannot merge another model: {e.what}", e.cure) from e


class Merging:
    """The merging methods of a plan at work on weights.

    Args:
        methods: in plan order; those without the site are left out.
        state: of every method, by its name.
        base_dir: where relative paths of other models are looked for.
    """

    def __init__(self, methods: Sequence[Method], state: Mapping[str, State], base_dir: Any, num_layers: int):
        self.methods = [m for m in methods if "merge" in m.sites()]
        self.state, self.base_dir, self.num_layers = state, base_dir, num_layers
        self._others: dict[str, dict[str, Saved | Adapted]] = {}
        self._learnt: dict[str, State] = {}  # from surveys; each pass over the weights begins anew

    def open(self, model: Any) -> None:
        """Find the tensors of other models, by the parameter names of the untouched base; none is read yet."""
        for m in self.methods:
            self._others[m.name] = {role: tensors_of(s, model) for role, s in sources_of(m, self.base_dir).items()}

    @torch.no_grad()
    def merge(self, model: Any, base_weights: Weights) -> None:
        """Change the parameters of a model with plain weights, in place.

        Under FSDP2 every tensor is gathered in every process, and all of them compute the same.
        """
        params = {c: p for n, p in model.named_parameters() if (c := canonical(n)) in base_weights}
        self.survey(params, base_weights)
        for name, p in params.items():
            p.copy_(cut_like(self.merged(name, base_weights[name], p), p))

    @torch.no_grad()
    def survey(self, params: Weights, base_weights: Weights) -> None:
        """Begin a pass over weights: show them to the methods that must rank over all; then comes `merged`."""
        self._learnt = {}
        for n, m in enumerate(self.methods):
            if type(m).survey is not Method.survey:
                self._survey(m, self.methods[:n], params, base_weights)

    @torch.no_grad()
    def merged(self, name: str, base: torch.Tensor, tuned: torch.Tensor, part: slice | None = None) -> torch.Tensor:
        """One tensor after all methods, whole and in fp32; with `part` these entries, of which `base` and `tuned` are
        (needs `in_parts`)."""
        return self._chain(self.methods, name, whole(base).float(), tuned, part)

    @property
    def in_parts(self) -> bool:
        """Whether a tensor may be merged in pieces."""
        others = [t for own in self._others.values() for t in own.values()]
        return all(m.entrywise() for m in self.methods) and all(isinstance(t, Saved) for t in others)

    def _survey(self, method: Method, before: Sequence[Method], params: Weights, base_weights: Weights) -> None:
        """Show a method all tensors, as those before it in the plan will have made them."""
        learnt = self._learnt[method.name] = {}
        for name, p in params.items():
            found = self._shown(method, before, name, whole(base_weights[name]).float(), p)
            if found is None:
                return
            learnt.update(found)

    def _shown(self, method: Method, before: Sequence[Method], name: str, base: torch.Tensor, p: Any) -> State | None:
        weights = self._weights(method, name, base, self._chain(before, name, base, p))
        return method.survey(name, weights, self._state(method), self.num_layers)

    def _chain(
        self, methods: Sequence[Method], name: str, base: torch.Tensor, p: torch.Tensor, part: slice | None = None
    ) -> torch.Tensor:
        new = whole(p.detach()).float()
        for m in methods:
            weights = self._weights(m, name, base, new, part)
            new = m.merge(name, weights, self._state(m), self.num_layers)
        return new

    def _weights(
        self, m: Method, name: str, base: torch.Tensor, tuned: torch.Tensor, part: slice | None = None
    ) -> dict[str, torch.Tensor]:
        others = {role: t.read(name, base, part) for role, t in self._others.get(m.name, {}).items()}
        return {"base": base, "tuned": tuned, **others}

    def _state(self, m: Method) -> State:
        return {**self.state[m.name], **self._learnt.get(m.name, {})}

    @torch.no_grad()
    def scale_adapter(self, factors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Scale what an adapter adds to each weight, in place: the only merging that is exact on it.

        Args:
            factors: (name of a weight of the base, the tensor that multiplies the adapter's change of it).
        """
        for name, p in factors:
            factor = torch.ones(())
            for m in self.methods:
                weights = {"base": torch.zeros(()), "tuned": factor}
                factor = m.merge(name, weights, self._state(m), self.num_layers)
            p.mul_(factor.to(p.dtype).item())
