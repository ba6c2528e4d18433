"""Versions of what decides the numbers."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

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


@cache
def code_of(*parts: str) -> str:
    """Code and data of these folders of the package, by content: what an older state of them made is not ours."""
    here, sha = Path(__file__).parent, hashlib.sha256()
    for file in (f for part in parts for f in sorted((here / part).rglob("*"))):
        if file.suffix in (".py", ".json", ".jsonl"):
            inside = hashlib.sha256(file.read_bytes()).hexdigest()
            sha.update(f"{file.relative_to(here).as_posix()} {inside} ".encode())
    return sha.hexdigest()
