"""A suite cut into parts without a common item: some to choose with, others to report on.

Of each task every second item is for the report. The others are for choosing: half of them for a coarse look at many
candidates, the rest (`fine`) for a second look at few. Items of one cluster, where a suite says that these are not
independent, stay together; else every part gets its share of each cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.measure.probe import Group, Probe, Suite

COARSE, FINE, REPORT = "coarse", "fine", "report"
TURN = (COARSE, REPORT, FINE, REPORT)


def cut(suite: Suite) -> dict[str, Suite]:
    """part -> the suite with that part's probes; tasks that have none there are left out."""
    at = _places(suite)
    return {part: _only(suite, (part,), at) for part in (COARSE, FINE, REPORT)}


def for_choosing(suite: Suite) -> Suite:
    """All probes that are for choosing: one look at them reads what they share once, two looks twice."""
    return _only(suite, (COARSE, FINE), _places(suite))


def whole_parts(suite: Suite, limit: str) -> dict[str, Suite]:
    """As `cut`, where every part has items, or the whole suite asks this model nothing.

    limit: what a user would raise.

    Raises:
        HoldfastError: a part has none.
    """
    parts = cut(suite)
    if not suite.probes:
        return parts
    few = next((part for part in parts if not parts[part].probes), None)
    if few:
        what = f"The suite {suite.name!r} has too few items at this limit: none is left for the part {few!r}."
        raise HoldfastError(what, f"Raise {limit} to 3 or more.")
    return parts


def _places(suite: Suite) -> dict[str, str]:
    """id of a probe -> its part."""
    together: dict[str, str] = {}  # a cluster that two tasks share stays in one part
    found: dict[str, str] = {}
    for group in suite.groups:
        for n, (cluster, probes) in enumerate(_units(group, [p for p in suite.probes if p.task == group.name])):
            part = TURN[n % len(TURN)]
            if group.clustered:
                part = together.setdefault(cluster, part)
            found |= {p.id: part for p in probes}
    return found


def _units(group: Group, probes: Sequence[Probe]) -> list[tuple[str, list[Probe]]]:
    """What is not torn apart, in order: clusters, or single probes with those of a cluster one after the other."""
    clusters: dict[str, list[Probe]] = {}
    for p in probes:
        clusters.setdefault(p.cluster or (p.id if group.clustered else ""), []).append(p)
    if group.clustered:
        return list(clusters.items())
    return [(name, [p]) for name, own in clusters.items() for p in own]


def _only(suite: Suite, parts: Sequence[str], at: dict[str, str]) -> Suite:
    probes = tuple(p for p in suite.probes if at[p.id] in parts)
    tasks = {p.task for p in probes}
    groups = tuple(g for g in suite.groups if g.name in tasks)
    return replace(suite, groups=groups, probes=probes, settings={**suite.settings, "part": "+".join(parts)})


def first_of_each(suite: Suite, most: int) -> Suite:
    """The suite with at most so many probes of each task."""
    seen, probes = Counter[str](), []
    for p in suite.probes:
        seen[p.task] += 1
        if seen[p.task] <= most:
            probes.append(p)
    return replace(suite, probes=tuple(probes), settings={**suite.settings, "most": most})


def join(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Measurements of several parts of one suite as one."""
    tasks: dict[str, Any] = {}
    for one in measured:
        for task in one["tasks"]:
            before = tasks.get(task["name"], {**task, "items": []})
            tasks[task["name"]] = {**before, "items": [*before["items"], *task["items"]]}
    return {**measured[0], "part": "+".join(m["part"] for m in measured), "tasks": list(tasks.values())}
