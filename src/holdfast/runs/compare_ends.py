"""What a run of a comparison scored on one half of the items, against the base's scores there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.data.metric import metric_of
from holdfast.measure import recipes
from holdfast.measure.packed import unpack, unpack_suite
from holdfast.measure.tuned_task import task_estimates
from holdfast.recipe import KEEP_FRAC
from holdfast.runs.contestants import Cell
from holdfast.runs.repair_search import Point, losses_of, margins_of

Measured = Mapping[str, Any]
Runs = Sequence[tuple[Cell, Measured]]
SHOWN = ("name", "status", "before", "after", "retention", "runs")


@dataclass(frozen=True)
class Ends:
    """The base's side of one half: the task's name and metric, its scores, and the share to keep of each ability.

    asked: those of the shares that the recipe itself says.
    """

    about: Mapping[str, Any]
    base: Measured
    floors: Mapping[str, float]
    asked: Collection[str] = ()

    @property
    def metric(self) -> Any:
        return metric_of(self.about["metric"])

    def task(self, found: Measured, against: Sequence[Any] | None = None) -> dict[str, Any]:
        """{"before", "after", "difference"} of a run's task, against the base's items or those given."""
        items = unpack(found["task"], self.base["task"])
        return task_estimates(self.metric, self.base["task"] if against is None else against, items)

    def task_of_base(self) -> dict[str, Any]:
        """The base's own score."""
        return task_estimates(self.metric, self.base["task"], self.base["task"])["after"]

    def abilities(self, runs: Sequence[Measured]) -> list[dict[str, Any]]:
        """Each ability of a recipe from its runs (`measure.recipes.abilities`)."""
        befores = self.base["abilities"]
        afters = [[unpack_suite(a, b) for a, b in zip(run["abilities"], befores, strict=True)] for run in runs]
        return [{k: part[k] for k in SHOWN} for part in recipes.abilities(befores, afters, self.floors, KEEP_FRAC)]

    def value(self, estimate: Mapping[str, Any]) -> float:
        """One number of a task score, higher is better."""
        return -estimate["value"] if self.metric.lower else estimate["value"]


def point_of(ends: Ends, cell: Cell, found: Measured) -> Point:
    """A run on the choosing half: its task score, and how far it stands above what must be kept."""
    task, abilities = ends.task(found)["after"], ends.abilities([found])
    kept = {a["name"]: a["retention"] for a in abilities if a["retention"]}
    margins = [*margins_of(kept, ends.floors), *losses_of(kept, ends.floors)]  # the verdict counts both
    shown = {"task": task, "kept": kept, "learning_rate": found["learning_rate"]}
    shown["early"] = found.get("early")  # a run of an older version has none
    return Point(cell, ends.value(task), min(margins, default=0.0), ("choose",), shown)


def bound(ends: Ends, abilities: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The abilities with a floor that could be measured at all."""
    return [a for a in abilities if a["name"] in ends.floors and a["retention"]]
