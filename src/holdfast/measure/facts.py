"""Further figures of a measurement, in the units of the field: bits per byte, ECE, gain over zero-shot and so on.

They are read from the same items as the score; none of them enters a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Items = list[Mapping[str, Any]]


def facts_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """Named figures of one suite; empty for suites that have none."""
    read = _FACTS.get(str(measured["suite"]))
    return read(measured) if read else {}


def _items(measured: Mapping[str, Any], *tasks: str) -> Items:
    return [i for t in measured["tasks"] if not tasks or t["name"] in tasks for i in t["items"]]


def _language(measured: Mapping[str, Any]) -> dict[str, float]:
    from holdfast.measure.suites.language import summary

    return {
        f"{t['name']}, {k.replace('_', ' ')}": v
        for t in measured["tasks"]
        for k, v in summary(t["items"]).items()
        if k != "perplexity"
    }


def _knowledge(measured: Mapping[str, Any]) -> dict[str, float]:
    from holdfast.measure.suites.knowledge import phrasing_spread

    return {f"{t['name']}, spread over phrasings": phrasing_spread(t["items"]) for t in measured["tasks"]}


def _calibration(measured: Mapping[str, Any]) -> dict[str, float]:
    from holdfast.measure.suites.calibration import summary

    return {f"{t['name']}, {k}": v for t in measured["tasks"] for k, v in summary(t["items"]).items()}


def _shots(measured: Mapping[str, Any]) -> dict[str, float]:
    from holdfast.measure.suites.shots import area, gain

    items = _items(measured)
    return {"area under the curve": area(items), "gain over zero-shot": gain(items)}


def _recognition(measured: Mapping[str, Any]) -> dict[str, float]:
    from holdfast.measure.suites.recognition import split

    return {f"{k}, above chance": v for k, v in split(measured).items()}


def _copying(measured: Mapping[str, Any]) -> dict[str, float]:
    from holdfast.measure.suites.copying import icl_score

    return {"ICL score": icl_score(_items(measured, "early tokens"), _items(measured, "late tokens"))}


def _format(measured: Mapping[str, Any]) -> dict[str, float]:
    from holdfast.measure.suites.format import label_share

    said = [i for i in _items(measured, "own words") if "output" in i]
    return {"answers that are a tuned label": label_share(said, measured["labels"])} if said else {}


def _marks(measured: Mapping[str, Any]) -> dict[str, float]:
    """The mean of each mark over the items that have it."""
    found: dict[str, list[float]] = {}
    for item in _items(measured):
        for name, value in item["marks"].items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


_FACTS: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "language": _language,
    "knowledge": _knowledge,
    "calibration": _calibration,
    "shots": _shots,
    "recognition": _recognition,
    "copying": _copying,
    "format": _format,
    "tools": _marks,
    "thinking": _marks,
}
