"""Versions of what decides the numbers."""

from __future__ import annotations

__version__ = "0.2.0.dev0"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import platform
    from importlib import metadata

    out = {"python": platform.python_version(), "holdfast": __version__}
    for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "lm_eval"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out
