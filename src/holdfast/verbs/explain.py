"""explain: what the plan of a recipe will do, checked on the real model, before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from holdfast.data.shares import TASK, quotas, title
from holdfast.recipe import Recipe, load_recipe
from holdfast.report.seen import seen_rows, show_rows
from holdfast.runs.run import Run

if TYPE_CHECKING:
    from holdfast.runs.work import Job


def planned(recipe: Recipe, base_dir: Path) -> Job:
    """The job of a recipe, checked on the real model; nothing is written."""
    from holdfast.runs import job

    return job.checked(Run(recipe, base_dir))


def command(recipe: Path, overrides: Sequence[str], rows: int) -> None:
    """`holdfast explain`: the plan as a table, and `rows` rows as the model will see them."""
    job = planned(load_recipe(recipe, overrides), recipe.absolute().parent)
    console = Console()
    console.print(_table(job))
    if isinstance(job.recipe.data.train, list):
        console.print(_sets(job))
    from holdfast.runs import budget
    from holdfast.runs.abilities import words

    asking = [m.name for m in job.session.methods if "base_logits" in m.needs]
    if asking:
        console.print(f"The base's answers are computed once before training, for: {', '.join(asking)}.")
    console.print(f"Learning rate: {job.rate.value:g} ({job.rate.why}).", markup=False, highlight=False)
    if said := words(job.recipe, job.suites):
        console.print(f"Abilities: {said}.", markup=False, highlight=False)
    console.print(f"{budget.words(job)}.", markup=False, highlight=False)
    if job.note:
        console.print(f"Note: {job.note}.", markup=False, highlight=False)
    if rows:
        show_rows(seen_rows(job, rows), console)


def _sets(job: Job) -> Table:
    """The training sets: rows, and how many of them an epoch draws."""
    there = Counter(job.task.token_rows.sources)
    weights = {f"{TASK}:{one.title}": one.weight for one in job.recipe.data.sets("train")}
    weighed = {name: weight for name, weight in weights.items() if weight}
    drawn = quotas(weighed, there.total(), "The number of rows") if weighed else there
    table = Table("training set", "weight", "rows", "drawn in an epoch")
    for name, weight in weights.items():
        shown = "by size" if weight is None else f"{weight:g}"
        table.add_row(title(name), shown, f"{there[name]:,}", f"{drawn[name]:,}")
    return table


def _table(job: Job) -> Table:
    title = f"{job.task.name}: {job.training.num_steps} steps"
    table = Table("method", "sites", "does", "settings", title=title)
    for row in job.session.plan.explain():
        settings = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
        table.add_row(row["method"], ", ".join(row["sites"]), row["does"], settings)
    return table
