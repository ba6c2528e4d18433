"""A user's own metric: `module:function` beside the recipe, called with prompt, answer and row, giving 0 to 1.

`command: PROGRAM` asks a program instead (`data.command_metric`).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from holdfast.data import command_metric
from holdfast.data.readers import records_of
from holdfast.data.rows import Row
from holdfast.data.sets import Set
from holdfast.errors import DataError
from holdfast.files import content_key
from holdfast.recipe import COMMAND

Function = Callable[[str, str, Mapping[str, Any]], float]  # prompt, answer, row -> 0 to 1


def load_function(name: str, base_dir: Path) -> Function:
    """The function of `module:function`: of a file in `base_dir`, else of an installed module. Runs the module.

    Raises:
        DataError: there is no such module or function, or the module does not load.
    """
    if name.startswith(COMMAND):
        return command_metric.function_of(name, base_dir)
    module_name, function = name.split(":")
    path = module_file(name, base_dir)
    try:
        with _beside(base_dir):
            module = _of_file(path) if path else importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        what = f"data.metric is {name}, and its module cannot be loaded ({type(error).__name__}: {error})."
        raise DataError(what, f"Put {module_name.replace('.', '/')}.py beside the recipe, and mend it.") from error
    found = getattr(module, function, None)
    if not callable(found):
        what = f"data.metric is {name}, but {path or module_name} has no function {function}."
        raise DataError(what, f"Define {function}(prompt, answer, row), which gives a number from 0 to 1.")
    return cast(Function, found)


def module_file(name: str, base_dir: Path) -> Path | None:
    """The file of the module, if it stands beside the recipe; None for a command."""
    if name.startswith(COMMAND):
        return None
    path = (base_dir / f"{name.split(':')[0].replace('.', '/')}.py").absolute()
    return path if path.is_file() else None


def identity(name: str, base_dir: Path) -> str | None:
    """What the module says, by content: a run goes on only with the function that it began with."""
    if name.startswith(COMMAND):
        return command_metric.identity(name, base_dir)
    path = module_file(name, base_dir)
    return content_key(path.read_text(encoding="utf-8", errors="replace")) if path else None


def judge(name: str, base_dir: Path, sets: Sequence[Set], rows: Sequence[Row]) -> Callable[..., float]:
    """(answer, row) -> score of `rows`, which come from `sets`, those they most likely come from first.

    The function's third argument is a dict: the columns of the row as the file has them, with "completion" and
    "where" where the file has no such columns. What it raises, and what is no number from 0 to 1, becomes a DataError
    that names the row.
    """
    function, columns = load_function(name, base_dir), _columns(sets, base_dir, {r.where for r in rows})

    def judged(answer: str, row: Row) -> float:
        told = {"completion": row.completion, "where": row.where, **columns.get(row.where, {})}
        try:
            score = float(function(row.prompt, answer, told))
        except Exception as error:  # whatever the user's function raises
            what = f"{row.where}: data.metric {name} failed on this row ({type(error).__name__}: {error})."
            raise DataError(what, "Mend what judges; the same command then goes on.") from error
        if not (math.isfinite(score) and 0 <= score <= 1):
            what = f"{row.where}: data.metric {name} gave {score:g} for this row."
            raise DataError(what, "Give a number from 0 (wrong) to 1 (right).")
        return score

    return judged


def _columns(sets: Sequence[Set], base_dir: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """place -> columns of the wanted rows, read once more: rows keep only what is trained on.

    Of several sets that have a place of the same name the first is asked; nothing is read beyond the last wanted row.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in sets:
        left = wanted - found.keys()
        for place, columns in records_of(one.source, base_dir, one.shown)[0] if left else ():
            if place in left:
                found[place] = columns
                left.remove(place)
            if not left:
                break
    return found


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Modules beside the recipe can be imported inside."""
    sys.path.insert(0, str(folder.absolute()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.absolute()))


def _of_file(path: Path) -> Any:
    """The module of a file, under a name of its own: two recipes may both have a rules.py."""
    name = f"holdfast_metric_{content_key(str(path), path.read_text(encoding='utf-8', errors='replace'))[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
