"""Who takes part in a comparison: plans by name, and the settings that each of them is tried with.

A plan is named by its methods with + between them, as `LoRA+Replay`. `plain` is full tuning without any method,
`default` the plan of a recipe that names none, and `recipe` the plan of the recipe at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import PlanError, suggest
from holdfast.files import safe_name
from holdfast.method import Method
from holdfast.methods import all_methods
from holdfast.plan import Plan
from holdfast.recipe import Recipe
from holdfast.runs.job import default_plan

RATE = "learning_rate"  # how the name of a setting ends that is the rate of a stage
OWN = {"plain": "full tuning, no method", "default": "the default plan", "recipe": "the recipe's own plan"}


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison: a plan, by how much its rate and strength are multiplied, and a seed."""

    plan: str
    factor: float
    seed: int
    strength: float = 1.0

    @property
    def folder(self) -> str:
        """Its name in the folder of the comparison."""
        strength = "" if self.strength == 1 else f".s{written(self.strength)}"
        return f"{safe_name(self.plan)}.x{written(self.factor)}{strength}.{self.seed}"

    @property
    def label(self) -> str:
        strength = "" if self.strength == 1 else f", strength x {written(self.strength)}"
        return f"{self.plan}, rate x {written(self.factor)}{strength}, seed {self.seed}"


def written(factor: float) -> str:
    """A factor as names of folders have it."""
    return f"{factor:.3g}"


def plans_of(names: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """name -> the recipe's `plan` of it; every plan is checked as far as that needs no model.

    Raises:
        PlanError: nobody takes part, a method is unknown, or the methods of a plan cannot go together.
    """
    asked = ["+".join(part.strip() for part in n.split("+")) for n in names if n.strip()]
    if not asked:
        raise PlanError("Nothing is to be compared.", "Write --methods default,plain,LoRA, for example.")
    doubled = next((n for n in asked if asked.count(n) > 1), None)
    if doubled:
        raise PlanError(f"{doubled} is to be compared with itself.", "Name each plan once.")
    return {name: _plan(name, recipe) for name in asked}


def _plan(name: str, recipe: Recipe) -> Any:
    if name == "recipe":
        found = recipe.plan
    elif name in OWN:
        found = None if name == "default" else []
    else:
        found = name.split("+")
        known = all_methods()
        wrong = next((one for one in found if one not in known), None)
        if wrong in OWN:
            what = f"{name} adds to {wrong}, which is a whole plan ({OWN[wrong]}) and no method."
            raise PlanError(what, "Name every method of the plan, as in LoRA+Replay.")
        if wrong is not None:
            raise PlanError(f"There is no method {wrong!r}.", suggest(wrong, [*known, *OWN]))
    built(found).check_together()
    return found


def built(plan: Any) -> Plan:
    """The plan of a recipe's `plan`, of which None is the default one."""
    return Plan(default_plan()) if plan is None else Plan.from_recipe(plan)


def faster(plan: Plan, factor: float) -> Plan:
    """The plan with the rates that its stages bring along times `factor`: the run's own rate does not reach them."""
    return Plan([dataclasses.replace(m, **{k: factor * v for k, v in _rates(m).items()}) for m in plan.methods])


def has_rates(plan: Plan) -> bool:
    """Whether some stage brings a rate of its own along."""
    return any(_rates(m) for m in plan.active)


def _rates(method: Method) -> dict[str, float]:
    return {k: v for k, v in method.settings().items() if k.endswith(RATE) and v is not None}


def check_seeds(seeds: int) -> None:
    """Raise PlanError where nothing would run."""
    if seeds < 1:
        raise PlanError(f"{seeds} seeds are no run.", "Write --seeds 1 or more.")
