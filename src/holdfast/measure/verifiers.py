"""Whether an answer is right: functions of (answer, reference, row) that give a score from 0 to 1, found by name.

    exact        the whole answer, blanks around it apart
    contains     the reference stands in the answer as whole words, whatever their case
    number       the last number of the answer is the last number of the reference
    file:name    the function `name` of the user's `file`.py beside the recipe, or of an installed module

`row` is a `data.rows.Row` with the prompt and the reference as text.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.data.metric import last_number
from holdfast.errors import PlanError, suggest
from holdfast.measure.verify import _has

Verifier = Callable[[str, str, Any], float]


def exact(answer: str, reference: str, row: Any) -> float:
    """1 where both say the same to the letter."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str, row: Any) -> float:
    """1 where the reference stands in the answer; blanks of any length are alike."""
    wanted = " ".join(reference.split())
    return float(bool(wanted) and _has(" ".join(answer.split()), wanted) >= 0)


def number(answer: str, reference: str, row: Any) -> float:
    """1 where the last numbers are equal; a reference without a number is never met."""
    said, wanted = last_number(answer), last_number(reference)
    return float(wanted is not None and said == wanted)


KNOWN: dict[str, Verifier] = {"exact": exact, "contains": contains, "number": number}


def verifier(name: str, base_dir: Path | None = None) -> Verifier:
    """The verifier called `name`; `base_dir` is the recipe's folder.

    Raises:
        PlanError: there is none, or the user's module cannot be imported.
    """
    if name in KNOWN:
        return KNOWN[name]
    module, _, function = name.partition(":")
    if not (module and function):
        raise PlanError(f"There is no verifier {name!r}.", f"{suggest(name, tuple(KNOWN))} Or write module:function.")
    try:
        found = getattr(_module(module, base_dir), function)
    except Exception as error:  # whatever the user's module does when it is imported
        what = f"The verifier {name!r} cannot be imported ({type(error).__name__}: {error})."
        raise PlanError(what, f"Write the function into {module}.py beside the recipe.") from error
    if not callable(found):
        raise PlanError(f"The verifier {name!r} is no function.", "Name one of (answer, reference, row).")
    return lambda answer, reference, row: _score(name, found(answer, reference, row))


def _module(name: str, base_dir: Path | None) -> Any:
    """The module, of the file beside the recipe if there is one."""
    path = Path(base_dir or ".") / f"{name}.py"
    if not path.is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _score(name: str, value: Any) -> float:
    """A score of a user's verifier, checked."""
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise PlanError(f"The verifier {name!r} gave {value!r}.", "Let it give a number from 0 to 1, or a bool.")
    return float(value)
