"""A user's own metric as a command: started once for each written answer, beside the recipe.

It gets one JSON object {"prompt", "answer", "row"} on its standard input, and prints one number from 0 to 1.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import DataError
from holdfast.files import content_key
from holdfast.recipe import COMMAND

SECONDS = 60.0  # ours: of one answer
SHOWN = 200  # characters of what a command said


def function_of(name: str, base_dir: Path) -> Callable[[str, str, Mapping[str, Any]], float]:
    """(prompt, answer, row) -> what the command of a metric `command: ...` says.

    Raises:
        DataError: there is no such program.
    """
    words = _words(name)
    if shutil.which(_beside(words[0], base_dir)) is None:
        what = f"data.metric is {name!r}, and {words[0]} is no program on PATH or beside the recipe."
        raise DataError(what, "Write the command as a shell would find it, such as: command: python judge.py")

    def says(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        asked = json.dumps({"prompt": prompt, "answer": answer, "row": dict(row)}, ensure_ascii=False, default=str)
        done = subprocess.run(
            [_beside(words[0], base_dir), *words[1:]],
            input=asked, capture_output=True, text=True, encoding="utf-8", errors="replace", cwd=base_dir,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"exit code {done.returncode}: {_shown(done.stderr)}")
        try:
            return float(done.stdout)
        except ValueError:
            raise ValueError(f"it printed {_shown(done.stdout)!r} and no number") from None

    return says


def identity(name: str, base_dir: Path) -> str:
    """The command, with the content of the files beside the recipe that it names."""
    words = _words(name)
    files = [base_dir / word for word in words if (base_dir / word).is_file()]
    return content_key(words, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def _words(name: str) -> list[str]:
    try:
        words = shlex.split(name.removeprefix(COMMAND))
    except ValueError as error:
        raise DataError(f"data.metric is {name!r}, which is no command: {error}.", "Close the quotes.") from None
    if not words:
        raise DataError("data.metric is a command without a program.", "Write: command: python judge.py")
    return words


def _beside(program: str, base_dir: Path) -> str:
    """A program of the recipe's folder by its whole path."""
    own = base_dir / program
    return str(own.absolute()) if own.is_file() else program


def _shown(text: str) -> str:
    return " ".join(text.split())[-SHOWN:]
