"""Who takes part in a comparison: plans by name, and the settings that each of them is tried with.

A plan is named by its methods with + between them, as `LoRA+Replay`. `plain` is full tuning without any method,
`default` the plan of a recipe that names none, and `recipe` the plan of the recipe at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import PlanError, suggest
from holdfast.files import safe_name
from holdfast.methods import all_methods
from holdfast.plan import Plan
from holdfast.recipe import Recipe
from holdfast.runs.job import default_plan

OWN = {"plain": "full tuning, no method", "default": "the default plan", "recipe": "the recipe's own plan"}


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison: a plan, how much its learning rate is multiplied, and a seed."""

    plan: str
    factor: float
    seed: int

    @property
    def folder(self) -> str:
        """Its name in the folder of the comparison."""
        return f"{safe_name(self.plan)}.x{written(self.factor)}.{self.seed}"

    @property
    def label(self) -> str:
        return f"{self.plan}, rate x {written(self.factor)}, seed {self.seed}"


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
    built = Plan(default_plan()) if found is None else Plan.from_recipe(found)
    built.check_together()
    return found


def check_grid(factors: Sequence[float], seeds: int) -> None:
    """Raise PlanError for a grid in which nothing stands."""
    if not factors:
        raise PlanError("The grid of learning rates is empty.", "Write --factor 1, for example.")
    bad = next((f for f in factors if not 0 < f < float("inf")), None)
    if bad is not None:
        raise PlanError(f"A learning rate cannot be multiplied by {bad:g}.", "Give numbers above 0, such as 0.33.")
    if len({written(f) for f in factors}) < len(factors):
        what = f"The grid of learning rates {list(factors)} holds one twice, to three digits."
        raise PlanError(what, "Name each factor once.")
    if seeds < 1:
        raise PlanError(f"{seeds} seeds are no run.", "Write --seeds 1 or more.")
