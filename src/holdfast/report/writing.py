"""Reports as files: .json, .html, .md or .xml (JUnit), as the name asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.files import write_text
from holdfast.report import markdown, page

WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    ".json": lambda report: json.dumps(report, indent=1, allow_nan=False),
    ".html": page.render,
    ".md": markdown.summary,
    ".xml": markdown.junit,
}


def may_write(path: Path, endings: Sequence[str] = tuple(WRITERS)) -> None:
    """Make ready for a file at `path` before long work. Under several processes an older file there is removed.

    torchrun ends with exit code 1 whatever happened, so there the file alone says the verdict, and it must not be that
    of an earlier check.

    Raises:
        HoldfastError: the ending is none of `endings`, or a folder lies there.
    """
    from holdfast.engine import processes

    if endings and path.suffix not in endings:
        raise HoldfastError(f"{path} has no known ending.", f"Use one of: {', '.join(endings)}.")
    if path.is_dir():
        raise HoldfastError(f"{path} is a folder, so nothing can be written there.", "Name a file.")
    if processes.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        if processes.world()[1] > 1:
            path.unlink(missing_ok=True)


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as its file name asks: .json, .html, .md or .xml (JUnit)."""
    may_write(path)
    write_text(path, WRITERS[path.suffix](dict(report)))
