"""What is asked of a model in two halves that share no item: one to choose settings with, the other to report on.

Suites are cut as for `repair` (`measure.parts`). Of the task, validation rows choose and test rows are reported; where
a recipe has no test set, the validation rows are cut in two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from holdfast.data.rows import Row, split
from holdfast.errors import HoldfastError
from holdfast.files import content_key
from holdfast.measure.asking import score_suite
from holdfast.measure.parts import COARSE, REPORT, first_of_each, for_choosing, whole_parts
from holdfast.measure.probe import Ask, Suite
from holdfast.measure.suites import asked_of, build, remembered
from holdfast.runs.task_rows import score_rows
from holdfast.runs.work import Job

SUITES_SHARE = 0.7  # of the time a measurement takes, as its bar shows it; the task takes the rest
CHOOSE = "choose"
SEED = 0
FEWEST_ROWS = 8  # ours
Measured = dict[str, Any]  # {"abilities": [a measurement of each suite], "task": items}


class Halves:
    """The two halves of one job.

    Raises:
        HoldfastError: a suite or the task's rows cannot be cut in two.
    """

    def __init__(self, job: Job):
        self.job = job

    @cached_property
    def suites(self) -> dict[str, dict[str, Suite]]:
        """name -> part or half -> the suite with its probes; building them takes longer than cutting rows."""
        job, m = self.job, self.job.recipe.measure
        ask = Ask(job.tokenizer, m.num_fewshot, m.limit, labels=job.task.names)
        return {name: _cut(name, ask) for name in job.suites}

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """half -> rows of the task; equal rows stand in one half."""
        task = self.job.task
        if self.job.recipe.data.test and len(task.validation) >= FEWEST_ROWS:
            return {CHOOSE: list(task.validation), REPORT: list(task.test)}
        given = list(task.test if self.job.recipe.data.test else task.validation)
        if len(given) < FEWEST_ROWS:
            what = (
                f"{task.name} has {len(given)} rows to measure on, too few to choose with some and report on others."
            )
            raise HoldfastError(what, "Raise data.validation_size, or give data.test.")
        choose, report = split(given, 0.5, SEED)
        return {CHOOSE: [given[n] for n in choose], REPORT: [given[n] for n in report]}

    def measured(
        self,
        half: str,
        model: Any,
        soft_prompt: Any = None,
        *,
        key: str | None = None,
        tell: Callable[[float, str], None] = lambda share, words: None,
    ) -> Measured:
        """Abilities and task of a model on one half. key: of the model's content, for what is kept of a base."""
        found = self.abilities(half, model, key=key, tell=lambda share, words: tell(SUITES_SHARE * share, words))
        tell(SUITES_SHARE, "task")
        return {"abilities": found, "task": score_rows(self.job, model, self.rows[half], soft_prompt, key=key)}

    def abilities(
        self, half: str, model: Any, *, key: str | None = None, tell: Callable[[float, str], None]
    ) -> list[dict[str, Any]]:
        """A measurement of each suite on one half."""
        out = []
        for n, (name, own) in enumerate(self.suites.items()):
            tell(n / len(self.suites), name)
            out.append(self._suite(model, own[half], key))
        return out

    def looked_at(self, names: Sequence[str], model: Any, most: int) -> list[dict[str, Any]]:
        """At most `most` items of each task of these suites, of those that choose."""
        how = self.job.recipe.measure.forwards
        few = [first_of_each(self.suites[name][COARSE], most) for name in names]
        return [score_suite(model, self.job.tokenizer, suite, **how) for suite in few]

    def _suite(self, model: Any, suite: Suite, key: str | None) -> Measured:
        m = self.job.recipe.measure
        name = key and content_key(key, suite.name, suite.settings, asked_of(suite), m.rounds_as)
        return remembered(name, lambda: score_suite(model, self.job.tokenizer, suite, **m.forwards))


def halves_of(job: Job) -> Halves:
    """The halves of a job, once for all that ask."""
    return vars(job).setdefault("halves", Halves(job))


def choosing_rows(job: Job) -> Sequence[Row]:
    """The rows that may choose weights or settings: validation rows, in a halved run of the half that chooses."""
    return halves_of(job).rows[CHOOSE] if job.halved else job.task.validation


def _cut(name: str, ask: Ask) -> dict[str, Suite]:
    if name.startswith("lm_eval:"):
        what = f"{name} is to choose with and to report on, and it cannot be cut into two halves."
        raise HoldfastError(what, "Use suites of Holdfast or jsonl:<path>.")
    suite = build(name, ask)
    return {**whole_parts(suite, "measure.limit"), CHOOSE: for_choosing(suite)}
