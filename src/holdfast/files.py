"""Files and folders: the cache, names, and writing that a killed process leaves whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, ModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def cache_dir() -> Path:
    """Holdfast's folder, made on use: $HOLDFAST_HOME, $XDG_CACHE_HOME/holdfast or ~/.cache/holdfast."""
    home = os.environ.get("HOLDFAST_HOME")
    folder = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "holdfast"
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the cache folder {folder}: {error}", "Set HOLDFAST_HOME.") from error
    return folder.resolve()


def safe_name(text: str) -> str:
    """Return `text` as one harmless file name: ASCII letters, digits, '.', '_', '-'; at most 80 long."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip(".-")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    if name and len(name) <= 80 and not reserved:
        return name
    return f"{name[:67] or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextmanager
def fresh_folder(final: Path, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside `final`, renamed to it on success. A killed process leaves no half folder.

    With `replace` an older `final` gives way; without it, whoever renamed first wins, which is harmless
    because the folder's name is its content.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}")
    part.mkdir()
    try:
        yield part
        for file in part.iterdir():  # safetensors writes 0600; give every file the usual rights
            file.chmod(part.stat().st_mode & 0o666)
        old = part.with_name(part.name + "-old")
        if replace and final.exists():
            os.rename(final, old)
        try:
            os.rename(part, final)
        except OSError:
            if old.exists():
                os.rename(old, final)
            if replace or not final.is_dir():
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def newest(folder: Path, most: int) -> None:
    """Remove all but the `most` newest folders inside; what another process removes at the same time is gone too."""

    def age(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0

    inside = sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=age)
    for old in inside[: max(0, len(inside) - most)]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def no_bars() -> Iterator[None]:
    """Silence the progress bars of transformers, which would break our own output."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")  # another process may write the same
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as e:
        fresh.unlink(missing_ok=True)
        raise HoldfastError(f"{path} could not be written: {e.strerror or e}.", "Free some disk space.") from e


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, allow_nan=False, indent=1))


def content_key(*parts: Any) -> str:
    """A short hash of plain data, for names of cached files."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
