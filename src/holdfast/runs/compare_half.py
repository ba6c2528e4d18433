"""What a comparison keeps of one half of the items: the base's scores whole, and those of a run packed against them.

What another version, device or precision measured rounds otherwise, and scores that were packed against another base
would be unpacked to something else. So both say what made them, and what does not fit is measured anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.files import content_key
from holdfast.measure.packed import pack, pack_suite

Measured = Mapping[str, Any]


def base_file(half: str) -> str:
    """In the folder of the comparison."""
    return f"base.{half}.json"


def run_file(half: str) -> str:
    """In the folder of a run, whose report.json would be that of `tune`."""
    return f"half.{half}.json"


def is_base(found: Measured | None, made: Sequence[str], suites: Sequence[str]) -> bool:
    """Whether a stored half of the base is what would be measured now. made: see `measuring.made_by`."""
    if not found or found.get("made") != [*made]:
        return False
    return [one["suite"] for one in found["abilities"]] == [*suites]


def fits(found: Measured | None, base: Measured) -> bool:
    """Whether a stored half of a run was measured as the base was, and packed against just these scores of it."""
    return bool(found) and found.get("made") == base["made"] and found.get("against") == content_key(base)


def check_made(made: Sequence[str], base: Measured) -> None:
    """Raise HoldfastError where a run would not be measured as the base was: machines of a cluster may differ."""
    differ = ", ".join(sorted({*made} ^ {*base["made"]}))
    if differ:
        what = f"This run would be measured in another way than the base was; they differ in {differ}."
        raise HoldfastError(what, "Give all machines the same versions and the same kind of device.")


def packed(found: Measured, base: Measured) -> dict[str, Any]:
    """A run's scores as `fits` knows them again.

    Raises:
        HoldfastError: they are not of the base's items.
    """
    _check_items(found, base)
    return {
        "made": base["made"],
        "against": content_key(base),
        "abilities": [pack_suite(a, b) for a, b in zip(found["abilities"], base["abilities"], strict=True)],
        "task": pack(found["task"], base["task"]),
    }


def seconds(done: Mapping[str, Any]) -> float:
    """What a training took, however often it was killed: steps by the checkpoints' clock, and what stands around."""
    return done["seconds"] + sum(done["timing"].get(phase, 0.0) for phase in ("prepare", "search"))


def _check_items(found: Measured, base: Measured) -> None:
    """Scores are paired by their place, so the same items must stand there."""
    mine, theirs = dict(_ids(found)), dict(_ids(base))
    name = next((n for n in {**theirs, **mine} if mine.get(n) != theirs.get(n)), None)
    if name is not None:
        what = f"The items of {name} that this run was asked are not those that the base was asked."
        raise HoldfastError(what, "Choose another --out, to measure both anew.")


def _ids(one: Measured) -> Iterator[tuple[str, list[Any]]]:
    """(what is asked, the ids of its items in their order)."""
    yield "the task", [i["id"] for i in one["task"]]
    for suite in one["abilities"]:
        yield from ((f"{suite['suite']}/{t['name']}", [i["id"] for i in t["items"]]) for t in suite["tasks"])
