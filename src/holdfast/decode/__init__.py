"""At inference: several models side by side at every token. Weights stay as they are; nothing here trains.

`EmulatedTuning` and `Contrast` are logits processors for `model.generate`, which hold the other models;
`scale_tuning` puts the base's layers beside those of a tuned model, which then generates by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.decode.contrast import Contrast
    from holdfast.decode.emulated import EmulatedTuning, load_emulated
    from holdfast.decode.tuning_scale import load_scaled, scale_tuning, set_scale

_WHERE = {
    "Contrast": "contrast",
    "EmulatedTuning": "emulated",
    "load_emulated": "emulated",
    "load_scaled": "tuning_scale",
    "scale_tuning": "tuning_scale",
    "set_scale": "tuning_scale",
}
__all__ = ["Contrast", "EmulatedTuning", "load_emulated", "load_scaled", "scale_tuning", "set_scale"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'holdfast.decode' has no attribute {name!r}")
