"""tune: measure before, tune under a plan, measure after, report, export.

Every piece is a file in the run folder; a run that died goes on at its last finished piece, and a finished run does
nothing. Several processes (torchrun) all go through the same flow and share the work inside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from holdfast.recipe import Recipe, _resolved, load_recipe
from holdfast.report import terminal
from holdfast.report.progress import progress_on
from holdfast.runs.run import Run, Tell, silent
from holdfast.runs.several import join


def tune(recipe: str | Path | Recipe, overrides: list[str] | None = None, *, tell: Tell | None = None) -> Path:
    """Run a recipe; returns the run folder, which holds `report.json` and `report.html`.

    Raises:
        HoldfastError: one clear message for anything a user can mend, before long work where possible.
    """
    if isinstance(recipe, Recipe):
        run = Run(_resolved(recipe, Path.cwd()), Path.cwd(), tell or silent)
    else:
        run = Run(load_recipe(recipe, overrides or ()), Path(recipe).absolute().parent, tell or silent)
    go(run)
    return run.path


def go(run: Run) -> None:
    """The story of a run, from wherever its folder stands to its report."""
    folder = run.folder
    if folder.finished:
        run.tell("done", 1.0, f"This run is finished: {run.path}")
        return
    folder.claim()

    from holdfast.runs import export, job, measuring, report, training

    work = job.checked(run)
    folder.check_room(export.room(work), f"checkpoints and export of {work.source.name}")
    folder.keep_inputs(work.inputs())
    folder.write("plan.json", work.session.plan.explain())
    before = None if run.recipe.measure.skip_before else measuring.measured(work, "before", work.model)
    if folder.read("training.json"):
        tuned, soft_prompt = export.loaded(run)
    else:
        tuned, soft_prompt = training.trained(work)
    after = measuring.measured(work, "after", tuned, soft_prompt)
    report.write(work, tuned, before, after)
    run.tell("done", 1.0, str(run.path))


def command(recipe: Path, overrides: Sequence[str]) -> None:
    """`holdfast tune`: with a bar, and the verdict at the end."""
    loaded = load_recipe(recipe, overrides)
    writes = join()
    console = Console()
    with progress_on(console) as progress:
        run = Run(loaded, recipe.absolute().parent, progress.tell)
        was_done = run.folder.finished
        go(run)
    if not writes:
        return
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    if was_done:
        print(f"This run was finished before; nothing was done. Its folder: {run.path}")
    terminal.show(report, console, run.path / "report.html")
    print(f"Tuned model: {report['tuned']['path']}")
