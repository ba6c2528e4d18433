"""The search of a comparison (`--search N`): as many trials for every plan, proposed by Optuna's TPE sampler.

The first trial is the plan as it is. The next ones are drawn at random, and the later half from where trials were good
(tree-structured Parzen estimator, Bergstra et al. 2011), with the least share that must be kept as its constraint. The
sampler's seed is fixed and every answer of a folder is told again in its turn, so the same trials follow after a stop.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from holdfast.errors import HoldfastError, pip_install
from holdfast.runs.contestants import Cell, written
from holdfast.runs.repair_search import Point

RATES, STRENGTHS = (0.1, 10.0), (0.25, 4.0)  # ours: factors, searched on a logarithmic scale
SEED = 0


def check_search() -> None:
    """Raise HoldfastError where nothing can search."""
    if find_spec("optuna") is None:
        raise HoldfastError(
            "--search needs the package optuna, which is not installed.", f"Run: {pip_install('search')}."
        )


class Search:
    """The trials of one plan, one after the other: `ask`, run it, `tell`.

    Args:
        plan, seed: of its cells.
        num: trials.
        has: whether the plan has a strength to be searched.
    """

    def __init__(self, plan: str, seed: int, num: int, has: bool):
        optuna: Any = import_module("optuna")  # by name: type checkers would read all of it
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=SEED, n_startup_trials=min(10, max(2, num // 2)))
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._study.enqueue_trial({"rate": 1.0, **({"strength": 1.0} if has else {})})
        self._failed = optuna.trial.TrialState.FAIL
        self._plan, self._seed, self._left, self._has = plan, seed, num, has
        self._trial: Any = None

    def ask(self) -> Cell | None:
        """What is tried next; None: the budget is spent. A cell may come twice, and is then not run again."""
        if self._left == 0:
            return None
        self._left -= 1
        self._trial = self._study.ask()
        return Cell(self._plan, self._drawn("rate", RATES), self._seed, self._strength())

    def _strength(self) -> float:
        return self._drawn("strength", STRENGTHS) if self._has else 1.0

    def _drawn(self, name: str, bounds: tuple[float, float]) -> float:
        """A factor to three digits, as the names of folders have it."""
        return float(written(self._trial.suggest_float(name, *bounds, log=True)))

    def tell(self, point: Point | None) -> None:
        """What the last one scored; None: it failed."""
        if point is None:
            self._study.tell(self._trial, state=self._failed)
            return
        self._trial.set_constraint("kept", -point.margin)
        self._study.tell(self._trial, point.value)
