"""A comparison: plans on one recipe, each over a grid of as many trials, told apart on items that chose nothing.

1. Every plan trains once at each rate and strength of the grid, with the first seed. Validation rows and one half of
   every suite's items choose: the best task score among those that keep what is to be kept, else the nearest to it.
2. What was chosen is written down with its hash, before anything of the other half is looked at.
3. The chosen one trains with the other seeds, and all its runs are measured on test rows and the other half.

Where every plan has a single trial, nothing is chosen: the first phase is left out, with all its measuring.

Every run is a folder in `runs/`, as `tune` makes them, and goes on where it was killed. A run that fails is reported
and stops no other. The base is loaded and measured once, and rows are tokenised once. Of the models only the best of
each plan so far is kept, and none at the end.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.files import content_key
from holdfast.measure.parts import REPORT
from holdfast.recipe import AUTO, Export, Recipe, recipe_from
from holdfast.runs import export, settle, training
from holdfast.runs.bases import Bases
from holdfast.runs.budget import asked_to_keep
from holdfast.runs.compare_ends import Ends, point_of
from holdfast.runs.compare_half import base_file, check_made, fits, is_base, packed, run_file, seconds
from holdfast.runs.compare_report import compared
from holdfast.runs.contestants import Cell, built, faster, has_rates, plans_of
from holdfast.runs.folder import INPUTS, JsonOrder, RunFolder
from holdfast.runs.grid import Grid
from holdfast.runs.halves import CHOOSE, Measured, halves_of
from holdfast.runs.job import checked
from holdfast.runs.measuring import base_key, made_by
from holdfast.runs.repair_search import choose
from holdfast.runs.run import Run, Tell, silent
from holdfast.runs.search import Search
from holdfast.runs.work import Job

LAST, CHOSEN, TASK = "compare.json", "chosen.json", "task.json"
TRAINED = "trained.json"  # the training.json of a run whose model is gone
WORK = {"runs", CHOSEN, LAST, TASK, *map(base_file, (CHOOSE, REPORT))}
SHARED = ("model", "data", "metric", "validation rows")  # inputs of all plans; the others are one's own


@dataclass(frozen=True)
class Wish(JsonOrder):
    """What a comparison is asked for; a folder belongs to one."""

    recipe: Mapping[str, Any]
    methods: tuple[str, ...]
    factors: tuple[float, ...]
    seeds: int
    strengths: tuple[float, ...] = (1.0,)
    search: int = 0  # trials of each plan, instead of the grid

    @property
    def trials(self) -> int:
        """Of each plan, at the most."""
        return self.search or len(self.factors) * len(self.strengths)

    @property
    def halves(self) -> tuple[str, ...]:
        """What is measured: with a single trial nothing is chosen, so no item is asked for that."""
        return (CHOOSE, REPORT) if self.trials > 1 else (REPORT,)


class Comparison:
    """One comparison at work, in the folder `out`, from wherever it stands.

    Raises:
        HoldfastError: a plan cannot take part.
    """

    def __init__(self, wish: Wish, base_dir: Path, out: Path, tell: Tell = silent, bases: Bases | None = None):
        self.wish, self.base_dir, self.tell = wish, base_dir, tell
        self.recipe = recipe_from(wish.recipe)
        self.plans = plans_of(wish.methods, self.recipe)
        self.folder = RunFolder(out, wish, WORK, Wish.read, LAST, "--out")
        self.bases = bases or Bases()
        self.failed: dict[str, str] = {}
        self.rates: dict[str, float] = {}  # of each plan, before a factor
        self.suites: tuple[str, ...] = ()  # of all plans, once they are checked
        phases = wish.seeds + (wish.trials if CHOOSE in wish.halves else 0)
        self._done, self._all = 0, len(self.plans) * phases

    @property
    def share_done(self) -> float:
        """0..1, counted in runs."""
        return self._done / self._all

    def run(self) -> dict[str, Any]:
        """Both phases and the report."""
        self.begin()
        picked = {name: self.pick(name) for name in self.plans}
        self._write_down({n: cell for n, (_, cell) in picked.items()})
        self.before_report([cell for _, cell in picked.values() if cell])
        final = {name: list(self._report(cell)) for name, (_, cell) in picked.items() if cell}
        trials = {name: points for name, (points, _) in picked.items()}
        choosing = self._ends(CHOOSE) if CHOOSE in self.wish.halves else None
        report = compared(self._ends(REPORT), choosing, trials, final, self.failed, self.wish.seeds)
        self.folder.write(LAST, report)
        return self.folder.read(LAST)

    def begin(self) -> None:
        """Every plan on its real model and data, before anything is measured; then the base on both halves."""
        job, inputs, suites = None, {}, ()
        for n, name in enumerate(reversed(self.plans)):  # the first is checked last, and its job measures the base
            self.tell("check", n / len(self.plans), name)
            job = checked(self._run(Cell(name, 1.0, self.recipe.training.seed), silent))
            self.rates[name] = job.training.learning_rate
            suites = (*job.suites, *suites)
            inputs |= {k if k in SHARED else k + _of_plan(name): v for k, v in job.inputs().items()}
        assert job is not None, "somebody takes part"
        self.folder.keep_inputs(inputs)
        self.suites = tuple(dict.fromkeys(suites))  # `auto` may be more to a longer plan: what one is asked, all are
        self._measure_base(dataclasses.replace(job, suites=self.suites))

    def _measure_base(self, job: Job) -> None:
        halves, key, made = halves_of(job), base_key(job, job.model), made_by(job.model)
        for half in self.wish.halves:
            if not is_base(self.folder.read(base_file(half)), made, job.suites):
                found = halves.measured(half, job.model, key=key, tell=self._told("measure before"))
                self.folder.write(base_file(half), {**found, "made": made})
        self.folder.write(TASK, _task_of(job))

    # ---- the first phase

    def trials(self, name: str) -> Any:
        """Who says what is tried of a plan."""
        has, seed, wish = built(self.plans[name]).has_strength, self.recipe.training.seed, self.wish
        if wish.search:
            return Search(name, seed, wish.search, has)
        return Grid(name, seed, wish.factors, wish.strengths, has)

    def pick(self, name: str) -> tuple[list[Any], Cell | None]:
        """(what each trial scored on the choosing half, the cell of the chosen one or None if all failed)."""
        points: dict[Cell, Any] = {}
        trials = self.trials(name)
        if CHOOSE not in self.wish.halves:
            return [], trials.ask()
        while cell := trials.ask():
            found = self.attempt(cell, CHOOSE)
            point = None if found is None else point_of(self._ends(CHOOSE), cell, found)
            trials.tell(point)
            if point:
                points[cell] = point
                self._keep_only(choose([*points.values()]).candidate, [*points])
        found = [*points.values()]
        return found, choose(found).candidate if found else None

    def _keep_only(self, best: Cell, others: Sequence[Cell]) -> None:
        for cell in others:
            if cell != best:
                self._take_away(cell)

    def _take_away(self, cell: Cell) -> None:
        """The model of a run; with no training.json beside it the folder is one that `tune` would train in anew."""
        run = self._run(cell, silent)
        with suppress(FileNotFoundError):
            os.replace(run.path / "training.json", run.path / TRAINED)
        shutil.rmtree(run.export, ignore_errors=True)

    def _write_down(self, cells: Mapping[str, Cell | None]) -> None:
        """What was chosen, with a hash of what decides the run; before the reporting half is looked at."""
        known = self.folder.read(CHOSEN)
        said = {
            name: {
                "factor": cell.factor,
                "strength": cell.strength,
                "sha": self._sha(cell),
            }
            for name, cell in cells.items()
            if cell
        }
        if known != said:  # a run that had failed was tried again
            self.folder.write(CHOSEN, said)

    def _sha(self, cell: Cell) -> str:
        """Of recipe, model, data, versions, measuring code and device; where the run lies decides nothing."""
        recipe = self._variant(cell).model_dump(mode="json")
        recipe["training"].pop("output_dir")
        inputs, own = self.folder.read(INPUTS), _of_plan(cell.plan)
        inputs = {k: v for k, v in inputs.items() if k in SHARED or k.endswith(own)}
        return content_key(recipe, inputs, self.folder.read(base_file(REPORT))["made"])

    # ---- the second phase

    def before_report(self, chosen: Sequence[Cell]) -> None:
        """Hears which cells were chosen, before any is trained with further seeds."""

    def _report(self, chosen: Cell) -> Iterator[tuple[Cell, Measured]]:
        """The runs of a plan that were measured on the reporting half."""
        for cell in self.seeds(chosen):
            found = self.attempt(cell, REPORT)
            if found is not None:
                self._take_away(cell)
                yield cell, found

    def seeds(self, chosen: Cell) -> list[Cell]:
        return [dataclasses.replace(chosen, seed=self.recipe.training.seed + n) for n in range(self.wish.seeds)]

    # ---- one run

    def attempt(self, cell: Cell, half: str) -> Measured | None:
        """Scores of a run on one half, or None with the reason written down."""
        if cell.label in self.failed:
            return None
        try:
            self.before(cell, half)
            return self._measured(cell, half)
        except HoldfastError as e:
            self.failed[cell.label] = str(e)
        except Exception as e:  # out of memory, a full disk, and whatever a library refuses on this device
            self.failed[cell.label] = f"{type(e).__name__}: {e}"
        return None

    def before(self, cell: Cell, half: str) -> None:
        """Hears of a run before it is looked for."""

    def _measured(self, cell: Cell, half: str) -> Measured:
        """Scores of a run on one half, packed; trained first where it is not."""
        run = self._run(cell, self._of(cell))
        run.path.mkdir(parents=True, exist_ok=True)
        found = run.folder.read(run_file(half))
        if not fits(found, self.folder.read(base_file(half))):
            found = self.ask(run, half)
        self._done += 1
        return found

    def ask(self, run: Run, half: str) -> Measured:
        """Train a run where it is not trained yet, measure one half and write it down."""
        run.folder.claim()
        job, base = checked(run), self.folder.read(base_file(half))
        check_made(made_by(job.model), base)
        run.folder.keep_inputs(job.inputs())
        there = run.folder.read("training.json") and run.export.exists()  # that of a worse trial is taken away
        if not there:
            run.folder.check_room(export.room(job), f"checkpoints and export of {run.path.name}")
        if self.recipe.measure.budget:
            settle.remember(job, base_key(job, job.model))
        tuned, soft = export.loaded(run) if there else training.trained(job)
        found = halves_of(job).measured(half, tuned, soft, tell=lambda x, words: run.tell("measure after", x, words))
        done = run.folder.read("training.json")
        out = {
            "learning_rate": job.session.stages[-1].learning_rate or job.training.learning_rate,
            "seconds": seconds(done),
            "tokens_per_second": done["tokens_per_second"],
            "early": done.get("early"),
            **packed(found, base),
        }
        run.folder.write(run_file(half), out)
        return out

    def _ends(self, half: str) -> Ends:
        """The base's side of one half, and what must be kept."""
        floors, asked = self.recipe.measure.floors, asked_to_keep(self.recipe)
        return Ends(self.folder.read(TASK), self.folder.read(base_file(half)), floors, asked)

    def _variant(self, cell: Cell) -> Recipe:
        """The recipe of a run."""
        recipe = self.recipe
        rate = "auto" if recipe.training.learning_rate == "search" else recipe.training.learning_rate  # the grid does
        if cell.factor != 1:
            rate = self.rates[cell.plan] * cell.factor
        order = recipe.training.data_seed
        changed = {
            "seed": cell.seed,
            "data_seed": order if order is None else order + cell.seed - recipe.training.seed,
            "learning_rate": rate,
            "output_dir": str(self.folder.path / "runs" / cell.folder),
        }
        training = recipe.training.model_copy(update=changed)
        data = recipe.data.model_copy(update={"seed": recipe.seed_of_rows})  # the same rows, in another order
        exported = Export(dtype=recipe.export.dtype)  # no model is handed over
        measure = recipe.measure
        if AUTO in measure.suites and self.suites:
            measure = measure.model_copy(update={"suites": [*self.suites]})
        parts = {"plan": self._plan(cell), "data": data, "training": training, "measure": measure, "export": exported}
        return recipe.model_copy(update=parts)

    def _plan(self, cell: Cell) -> Any:
        """The plan of a run, as a recipe has it."""
        plan = self.plans[cell.plan]
        if cell.factor != 1 and has_rates(built(plan)):
            plan = faster(built(plan), cell.factor).to_recipe()
        return plan if cell.strength == 1 else built(plan).stronger(cell.strength).to_recipe()

    def _run(self, cell: Cell, tell: Tell) -> Run:
        return Run(self._variant(cell), self.base_dir, tell, halved=True, bases=self.bases)

    def _of(self, cell: Cell) -> Tell:
        return lambda phase, share, words: self.tell("compare", self.share_done, f"{cell.label}: {phase}")

    def _told(self, phase: str) -> Callable[[float, str], None]:
        return lambda share, words: self.tell(phase, share, words)


def _of_plan(name: str) -> str:
    """What follows the name of an input that belongs to one plan."""
    return f" (plan {name})"


def _task_of(job: Job) -> dict[str, Any]:
    task = job.task
    source = "test" if job.recipe.data.test else "validation"
    return {"name": task.name, "metric": task.metric, "split": source, "chance": task.chance}
