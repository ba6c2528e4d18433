"""JSON as the file wrote it: numbers keep their spelling, and what Python's reader bends in silence is refused.

Python reads 1e3 as 1000.0, Infinity as inf, and of a key given twice keeps the last.
"""

import json
import math
from typing import Any

from holdfast.errors import DataError

DIGITS = 4000  # Python itself turns integers of more than 4,300 digits into text no more


class Bent(Exception):
    """Valid for Python's reader, and not what the file says."""

    def __init__(self, what: str, cure: str):
        self.what, self.cure = what, cure

    def at(self, place: str) -> DataError:
        return DataError(f"{place}: {self.what}.", self.cure)


class Written(float):
    """A number that str() writes as the file did: 1e3, 1.10, -0, Infinity."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def _whole(text: str) -> int | float:
    if len(text) > DIGITS:
        raise Bent(f"a number of {len(text)} digits", "Write it as text, in quotes.")
    return Written(text) if text == "-0" else int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Bent(f"the key {twice!r} is given twice in one object", "Keep one of the two.")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=Written, parse_int=_whole, parse_constant=Written)
SYNTAX = json.JSONDecoder(parse_int=float)  # for a first pass that looks at the form alone


def parsed(text: str, what: str) -> Any:
    """The value of a JSON text that stands inside a row. `what` names it: file, line and key.

    Raises:
        DataError: no JSON, or a key given twice, or a number that is none.
    """
    try:
        return DECODER.decode(text)
    except Bent as error:
        raise error.at(what) from None
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", "too deep")
        raise DataError(f"{what} is text, and not valid JSON ({problem}).", "Write it as JSON.") from None


def sound(value: Any, what: str) -> str:
    """The JSON text of a nested value. `what` names it: file, line and key.

    Raises:
        DataError: it holds Infinity or NaN, or something that JSON has no form for.
    """
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        problem = "is nested too deep" if isinstance(error, RecursionError) else "holds a number that is not finite"
        raise DataError(f"{what} {problem}.", "Write a finite number, or the word in quotes.") from None
    except TypeError as error:
        raise DataError(f"{what} holds what JSON has no form for ({error}).", "Write text or numbers.") from None


def not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
