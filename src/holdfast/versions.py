"""Versions of what decides the numbers."""

from __future__ import annotations

import holdfast


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import platform
    from importlib import metadata

    out = {"python": platform.python_version(), "holdfast": holdfast.__version__}
    for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "lm_eval"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out
