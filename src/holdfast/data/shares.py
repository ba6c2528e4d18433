"""How much of each set of rows: parts of a count in given proportions."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.errors import DataError

TASK = "task"


def title(name: str) -> str:
    """What a user calls the set of rows that are called `name`."""
    return name.removeprefix(f"{TASK}:")


def equal(sizes: Mapping[str, int], total: int, what: str) -> dict[str, int]:
    """`total` in parts as equal as `sizes` allows: what has less gives all, and the others share the rest.

    Raises:
        DataError: there are more sets than `total`.
    """
    _check_total(sizes, total, what)
    given: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: sizes[name]):
        part = (total - sum(given.values())) // (len(sizes) - len(given))
        given[name] = min(sizes[name], part)
    return {name: given[name] for name in sizes}


def _check_total(sizes: Mapping[str, float], total: int, what: str) -> None:
    if total < len(sizes):
        raise DataError(
            f"{what} is {total}, and there are {len(sizes)} sets.", f"Raise {what} to {len(sizes)} or more."
        )


def quotas(sizes: Mapping[str, float], total: int, what: str) -> dict[str, int]:
    """`total` in the proportions of `sizes`, at least one of each; what: the setting that says `total`.

    Raises:
        DataError: there are more sets than `total`.
    """
    _check_total(sizes, total, what)
    whole = sum(sizes.values())
    exact = {name: size / whole * total for name, size in sizes.items()}
    given = {name: max(1, int(part)) for name, part in exact.items()}
    while (missing := total - sum(given.values())) != 0:
        step = 1 if missing > 0 else -1
        able = [name for name in given if step > 0 or given[name] > 1]
        given[max(able, key=lambda name: step * (exact[name] - given[name]))] += step
    return given
