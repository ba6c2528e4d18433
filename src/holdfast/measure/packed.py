"""Scores of the same items in a few kilobytes: columns instead of records, without what a reference holds alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Items = Sequence[Mapping[str, Any]]
TEXTS = ("answer", "prediction")  # words of a model: for a report, not for statistics
ABSENT = "\0"


def pack(items: Items, like: Items) -> dict[str, Any]:
    """Columns of `items` (N records) that differ from those of `like` (N records of the same items).

    A column of zeros and ones is a string of digits. `unpack` with the same `like` gives the records back, without
    what models wrote.
    """
    names = dict.fromkeys(k for side in (like, items) for i in side for k in i if k not in TEXTS)
    columns = {k: ([i.get(k, ABSENT) for i in items], [i.get(k, ABSENT) for i in like]) for k in names}
    return {k: _short(own) for k, (own, known) in columns.items() if own != known}


def unpack(packed: Mapping[str, Any], like: Items) -> list[dict[str, Any]]:
    """The records that `pack` had."""
    columns = {k: [int(c) for c in v] if isinstance(v, str) else v for k, v in packed.items()}
    out = []
    for n, known in enumerate(like):
        record = {k: v for k, v in known.items() if k not in TEXTS} | {k: v[n] for k, v in columns.items()}
        out.append({k: v for k, v in record.items() if v != ABSENT})
    return out


def pack_suite(measured: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks of a measurement (`measure.asking.score_suite`) against the base's measurement of the same suite."""
    known = {t["name"]: t["items"] for t in like["tasks"]}
    return {t["name"]: pack(t["items"], known[t["name"]]) for t in measured["tasks"]}


def unpack_suite(packed: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The measurement again."""
    tasks = [{**t, "items": unpack(packed[t["name"]], t["items"])} for t in like["tasks"]]
    return {**like, "tasks": tasks}


def _short(column: list[Any]) -> Any:
    binary = all(type(x) is int and x in (0, 1) for x in column)
    return "".join(map(str, column)) if binary else column
