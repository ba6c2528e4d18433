"""The base of several runs of one process, loaded once: every run gets a copy of what was loaded.

So whatever a run does to its model (adapters, replaced modules, trained weights) reaches no other one. The one that is
copied lies in main memory and is never run. Where there is no room for it, or a copy may be more or less than a fresh
load (packed weights, code of others), every run loads anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from holdfast import models
from holdfast.files import content_key
from holdfast.models.exported import free_memory
from holdfast.recipe import Recipe

ROOM = 2.5  # ours: the copy and some room for the run, in sizes of the model


class Bases:
    """Hands out the base of a recipe, always as it was loaded; holds one at a time."""

    def __init__(self) -> None:
        self._key, self._place = "", None
        self._kept: Any = None
        self.taught: dict[Any, Any] = {}  # the latest answers of this base (`services.Teacher.learn`)

    def load(self, recipe: Recipe, source: models.ModelSource, load: Callable[..., tuple[Any, Any]]) -> Any:
        """The model of `source` as `load` (`runs.job.load`) gives it, to be changed at will."""
        key = content_key(source.path, source.sha, recipe.model.model_dump(mode="json"), recipe.training.bf16)
        if key != self._key:
            self._key, self._kept = "", None  # the old one makes room first
            self.taught = {}
            model, _ = load(recipe, source, merge_adapter=True)
            if not _may_copy(recipe, model):
                return model
            self._key, self._place, self._kept = key, model.device, model.cpu()
        return copy.deepcopy(self._kept).to(self._place)


def _may_copy(recipe: Recipe, model: Any) -> bool:
    """Whether a copy is what a fresh load would be, and there is room for it."""
    if recipe.model.trust_remote_code or models.is_packed(model) or hasattr(model, "peft_config"):
        return False
    return free_memory() >= ROOM * sum(t.numel() * t.element_size() for t in model.state_dict().values())
