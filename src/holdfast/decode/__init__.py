"""At inference: several models side by side at every token. Weights stay as they are; nothing here trains.

`EmulatedTuning` and `Contrast` are logits processors for `model.generate`, which hold the other models;
`scale_tuning` puts the base's layers beside those of a tuned model, which then generates by itself; `specialist_hint`
writes prompts with a small model's drafts in them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.decode.contrast import Contrast
    from holdfast.decode.emulated import EmulatedTuning, load_emulated
    from holdfast.decode.hints import copy_rate, drafts_of, specialist_hint
    from holdfast.decode.tuning_scale import load_scaled, scale_tuning, set_scale

_WHERE = {
    "Contrast": "contrast",
    "EmulatedTuning": "emulated",
    "copy_rate": "hints",
    "drafts_of": "hints",
    "load_emulated": "emulated",
    "load_scaled": "tuning_scale",
    "scale_tuning": "tuning_scale",
    "set_scale": "tuning_scale",
    "specialist_hint": "hints",
}
__all__ = [
    "Contrast",
    "EmulatedTuning",
    "copy_rate",
    "drafts_of",
    "load_emulated",
    "load_scaled",
    "scale_tuning",
    "set_scale",
    "specialist_hint",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'holdfast.decode' has no attribute {name!r}")
