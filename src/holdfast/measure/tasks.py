"""The built-in in-context tasks. Anchor tasks may be trained on; held-out tasks never.

The two are different types: everything that trains takes `AnchorTask`, and only `anchor_tasks()` makes one, from
files whose role is "anchor". A held-out task therefore cannot reach a loss by mistake.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from holdfast.data.fewshot import Pair
from holdfast.errors import HoldfastError, suggest

FOLDER = Path(__file__).parent / "suites" / "incontext"


@dataclass(frozen=True)
class Task:
    """One few-shot task: items are (input, output) pairs; `labels` is the closed answer set or None."""

    name: str
    version: int
    category: str
    instruction: str
    input_name: str
    output_name: str
    labels: tuple[str, ...] | None
    items: tuple[Pair, ...]

    @property
    def names(self) -> tuple[str, str]:
        return self.input_name, self.output_name

    @property
    def chance(self) -> float:
        """Accuracy of the best constant answer: the honest floor."""
        if self.labels is None:
            return 0.0
        outputs = [y for _, y in self.items]
        return max(max(map(outputs.count, set(outputs))) / len(outputs), 1 / len(self.labels))


class AnchorTask(Task):
    """A task that may be used in training."""


class HeldOutTask(Task):
    """A task that is only ever measured."""


@lru_cache(maxsize=1)
def _all() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for path in sorted(FOLDER.glob("*.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = AnchorTask if raw["role"] == "anchor" else HeldOutTask
        found[raw["name"]] = _task(raw, kind)
    return found


def _task(raw: dict, kind: type[Task]) -> Task:
    return kind(
        name=raw["name"],
        version=raw["version"],
        category=raw["category"],
        instruction=raw["instruction"],
        input_name=raw["input_name"],
        output_name=raw["output_name"],
        labels=tuple(raw["labels"]) if raw["labels"] else None,
        items=tuple((i["input"], i["output"]) for i in raw["items"]),
    )


def tasks() -> dict[str, Task]:
    """Every built-in task by name."""
    return dict(_all())


def anchor_tasks(names: tuple[str, ...] | None = None) -> tuple[AnchorTask, ...]:
    """The anchor tasks, all or by name. A held-out name is refused: what is measured is never trained on."""
    known = {n: t for n, t in _all().items() if isinstance(t, AnchorTask)}
    for name in names or ():
        if name in _all() and name not in known:
            raise HoldfastError(
                f"{name!r} is a held-out task: training on it would make its measurement worthless.",
                f"Anchor on one of: {', '.join(sorted(known))}.",
            )
        if name not in known:
            raise HoldfastError(f"There is no anchor task {name!r}.", suggest(name, tuple(known)))
    return tuple(known[n] for n in (names or sorted(known)))


def held_out_tasks(names: tuple[str, ...] | None = None) -> tuple[HeldOutTask, ...]:
    """The held-out tasks, all or by name."""
    known = {n: t for n, t in _all().items() if isinstance(t, HeldOutTask)}
    for name in names or ():
        if name not in known:
            raise HoldfastError(f"There is no held-out task {name!r}.", suggest(name, tuple(known)))
    return tuple(known[n] for n in (names or sorted(known)))
