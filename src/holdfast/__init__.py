"""Fine-tune a language model without losing what it knows, and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.versions import __version__

if TYPE_CHECKING:
    from holdfast.errors import HoldfastError
    from holdfast.hosts.hf import with_plan
    from holdfast.method import Method
    from holdfast.plan import Plan
    from holdfast.sites.replace import load
    from holdfast.verbs import check
    from holdfast.verbs.callback import RetentionCallback
    from holdfast.verbs.tune import tune

_WHERE = {
    "tune": "holdfast.verbs.tune",
    "Plan": "holdfast.plan",
    "load": "holdfast.sites.replace",
    "with_plan": "holdfast.hosts.hf",
    "Method": "holdfast.method",
    "HoldfastError": "holdfast.errors",
    "RetentionCallback": "holdfast.verbs.callback",
}
_MODULES = {"check": "holdfast.verbs.check"}  # public modules that moved into a room
__all__ = ["HoldfastError", "Method", "Plan", "RetentionCallback", "__version__", "check", "load", "tune", "with_plan"]


def __getattr__(name: str) -> Any:  # heavy libraries are imported only where used
    import importlib

    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
