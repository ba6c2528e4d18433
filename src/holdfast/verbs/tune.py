"""tune: measure before, tune under a plan, measure after, report, export.

Every piece is a file in the run folder; a run that died goes on at its last finished piece, and a finished run does
nothing. Several processes (torchrun) all go through the same flow and share the work inside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.errors import HoldfastError
from holdfast.measure.names import DEFAULT, names_of
from holdfast.recipe import AUTO, KEEP_FRAC, KEEP_IN_CONTEXT, Recipe, _resolved, load_recipe, recipe_from
from holdfast.report import terminal
from holdfast.report.progress import progress_on
from holdfast.runs.run import Run, Tell, silent
from holdfast.runs.several import join
from holdfast.verbs.check import floors_of

DEFAULT_BUDGET = "default"  # `--keep default`: these shares of all default suites; ours
NO_BUDGET = "none"  # `--keep none`: nothing is taken back


def tune(recipe: str | Path | Recipe, overrides: list[str] | None = None, *, tell: Tell | None = None) -> Path:
    """Run a recipe; returns the run folder, which holds `report.json` and `report.html`.

    Raises:
        HoldfastError: one clear message for anything a user can mend, before long work where possible.
    """
    run = Run(*_loaded(recipe, overrides or ()), tell or silent)
    go(run)
    return run.path


def _loaded(recipe: str | Path | Recipe, overrides: Sequence[str]) -> tuple[Recipe, Path]:
    """A recipe with absolute paths, and the folder that its methods' paths start from."""
    if isinstance(recipe, Recipe):
        return _resolved(recipe, Path.cwd()), Path.cwd()
    return load_recipe(recipe, overrides), Path(recipe).absolute().parent


def go(run: Run) -> None:
    """The story of a run, from wherever its folder stands to its report, and what follows it."""
    from holdfast.runs import handover

    if run.folder.finished:
        run.tell("done", 1.0, f"This run is finished: {run.path}")
    else:
        _work(run)
    handover.hand_over(run)


def _work(run: Run) -> None:
    """From the check of the recipe to the report."""
    folder = run.folder
    folder.claim()

    from holdfast.runs import export, job, measuring, report, settle, training

    work = job.checked(run)
    folder.check_room(export.room(work), f"checkpoints and export of {work.source.name}")
    folder.keep_inputs(work.inputs())
    folder.write("plan.json", work.session.plan.explain())
    before = None if run.recipe.measure.skip_before else measuring.measured(work, "before", work.model)
    if work.budget:
        settle.remember(work, measuring.base_key(work, work.model))
    if folder.read("training.json"):
        tuned, soft_prompt = export.loaded(run)
    else:
        tuned, soft_prompt = training.trained(work)
    after = measuring.measured(work, "after", tuned, soft_prompt)
    report.write(work, tuned, before, after)
    run.tell("done", 1.0, str(run.path))


def tune_seeds(
    recipe: str | Path | Recipe,
    seeds: int,
    overrides: Sequence[str] = (),
    *,
    base_dir: Path | None = None,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Run a recipe with several seeds, each in a folder of its own; returns what stands in seeds.json beside them.

    The verdict is about the recipe, where that of one run is about its weights.

    Raises:
        HoldfastError: as `tune`, or for a recipe that cannot have several seeds.
    """
    from holdfast.runs.seeds import check_seeds, runs_of, summarised

    loaded, here = _loaded(recipe, overrides)
    check_seeds(loaded, seeds)
    runs = []
    for run in runs_of(loaded, base_dir or here, seeds, tell):
        go(run)
        runs.append(run)
    return summarised(runs, Path(loaded.training.output_dir))


def budgeted(recipe: Recipe, floors: Mapping[str, float]) -> Recipe:
    """The recipe with a budget: these shares are to be kept beside its own, and what breaks one is taken back."""
    measure = recipe.measure.model_dump()
    kept = {**(recipe.measure.keep or {}), **floors}
    named = measure["suites"]  # what has a floor is measured beside auto
    suites = named if AUTO in named else [*named, *(n for n in floors if n not in names_of(named))]
    return recipe_from({**recipe.model_dump(), "measure": {**measure, "suites": suites, "keep": kept, "budget": True}})


def command(recipe: Path, overrides: Sequence[str], seeds: int | None = None, keep: Sequence[str] = ()) -> int:
    """`holdfast tune`: with a bar, and the verdict at the end; its exit status."""
    if seeds is not None:
        return _command_seeds(recipe, overrides, seeds, keep)
    loaded = _wished(recipe, overrides, keep)
    writes = join()
    console = Console()
    with progress_on(console) as progress:
        run = Run(loaded, recipe.absolute().parent, progress.tell)
        was_done = run.folder.finished
        go(run)
    if not writes:
        return 0
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    if was_done:
        print(f"This run was finished before; nothing was done. Its folder: {run.path}")
    terminal.show(report, console, run.path / "report.html")
    print(f"Tuned model: {report['tuned']['path']}")
    return _exit(report, report["training"].get("budget"))


def _exit(report: Mapping[str, Any], *budgets: Mapping[str, Any] | None) -> int:
    """1 where a budget was not met, or was on the items that chose and the reported ones show a loss; else 0."""
    held = [budget for budget in budgets if budget]
    lost = bool(held) and report["verdict"]["status"] == "lost"
    return int(lost or any(budget["met"] is False for budget in held))


def _wished(recipe: Path, overrides: Sequence[str], keep: Sequence[str]) -> Recipe:
    loaded = load_recipe(recipe, overrides)
    if list(keep) == [NO_BUDGET]:
        return loaded.model_copy(update={"measure": loaded.measure.model_copy(update={"budget": False})})
    if NO_BUDGET in keep:
        raise HoldfastError(f"--keep {NO_BUDGET} takes nothing back, and another --keep names a share.", "Give one.")
    return budgeted(loaded, floors_to_keep(keep)) if keep else loaded


def floors_to_keep(items: Sequence[str]) -> dict[str, float]:
    """The floors of a budget, each "ability=share"; "default" is those of all default suites. What is named counts."""
    usual = {**dict.fromkeys(DEFAULT, KEEP_FRAC), "in-context": KEEP_IN_CONTEXT} if DEFAULT_BUDGET in items else {}
    return {**usual, **floors_of([i for i in items if i != DEFAULT_BUDGET])}


def _command_seeds(recipe: Path, overrides: Sequence[str], seeds: int, keep: Sequence[str]) -> int:
    if not join() or os.environ.get("WORLD_SIZE", "1") != "1":
        raise HoldfastError(
            "--seeds works in one process, and torchrun started several.", "Start it without torchrun."
        )
    console = Console()
    with progress_on(console) as progress:
        loaded = _wished(recipe, overrides, keep)
        report = tune_seeds(loaded, seeds, base_dir=recipe.absolute().parent, tell=progress.tell)
    terminal.show(report, console, Path(report["seeds"][0]["path"]).parents[1] / "seeds.html")
    for one in report["seeds"]:
        print(f"Seed {one['seed']}: {one['status']}. Tuned model: {one['path']}")
    return _exit(report, *(one["budget"] for one in report["seeds"]))
