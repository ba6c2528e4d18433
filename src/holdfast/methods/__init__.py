"""Every method, by name. One file each, in the folder of its defining site; this module only gathers them."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any

from holdfast.method import Method


@lru_cache(maxsize=1)
def all_methods() -> dict[str, type[Method]]:
    """Name -> class of every method, found in the site folders."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.walk_packages(__path__, __name__ + "."):
        if module.ispkg or module.name.rsplit(".", 1)[1].startswith("_"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.name:
                found[value.__name__] = value
    return dict(sorted(found.items()))


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return all_methods()[name]
    except KeyError:
        raise AttributeError(f"holdfast.methods has no method {name!r}") from None


def __dir__() -> list[str]:
    return [*all_methods(), "all_methods"]
