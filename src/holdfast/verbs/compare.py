"""compare: several plans on one recipe, each at its best settings, told apart on items that chose nothing.

The folder OUT is a run folder: the same command goes on where it was, and a finished one does nothing. Runs that
failed are tried again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.errors import HoldfastError, PlanError
from holdfast.recipe import Recipe, _resolved, load_recipe
from holdfast.report.progress import progress_on
from holdfast.runs.run import Tell, silent

FACTORS = (1 / 3, 1.0, 3.0)  # ours: of the recipe's learning rate


def compare(
    recipe: str | Path | Recipe,
    methods: Sequence[str],
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    factors: Sequence[float] | None = None,
    strengths: Sequence[float] | None = None,
    search: int | None = None,
    seeds: int = 1,
    ray: bool = False,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Compare `methods` (plans by name: `runs.contestants`) on a recipe; returns what stands in `out`/compare.json.

    factors: what the recipe's learning rate is multiplied by (None: 1/3, 1 and 3). strengths: the same for what each
    method calls its strength (None: 1). search: so many trials of each plan instead, proposed by Optuna. seeds: runs
    of each plan at the settings that were chosen. ray: do the runs on a Ray cluster, whose machines all see `out`.

    Raises:
        HoldfastError: one clear message for what a user can mend, before any training.
    """
    from holdfast.report import compared as shown
    from holdfast.runs.compare import compare as run
    from holdfast.runs.comparison import Wish

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise HoldfastError(
            "compare works in one process, and torchrun started several.", "Start it without torchrun."
        )
    here = Path.cwd() if isinstance(recipe, Recipe) else Path(recipe).absolute().parent
    loaded = _resolved(recipe, here) if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    rates, strong = _grid(factors, strengths, search)
    wish = Wish(loaded.model_dump(mode="json"), tuple(methods), rates, seeds, strong, search or 0)
    report = run(wish, here, Path(out), tell, ray)
    shown.write(report, Path(out))
    return report


def _grid(
    factors: Sequence[float] | None, strengths: Sequence[float] | None, search: int | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The grid of a comparison; a search has none."""
    if search is None:
        return tuple(FACTORS if factors is None else factors), tuple((1.0,) if strengths is None else strengths)
    given = "--factor" if factors is not None else "--strength" if strengths is not None else ""
    if given:
        raise PlanError(
            f"--search {search} chooses its settings itself, and {given} names some.", "Remove one of them."
        )
    if search < 1:
        raise PlanError(f"--search {search} is no trial.", "Write --search 8, for example.")
    return (), ()


def command(
    recipe: Path,
    overrides: Sequence[str],
    *,
    methods: Sequence[str],
    factors: Sequence[float] | None,
    strengths: Sequence[float] | None,
    search: int | None,
    seeds: int,
    ray: bool,
    out: Path,
) -> int:
    """`holdfast compare`: the table and the advice on the terminal and in files, and an exit code."""
    from holdfast.report import compared as shown

    console = Console()
    with progress_on(console) as progress:
        report = compare(
            recipe,
            methods,
            out,
            overrides=overrides,
            factors=factors or None,
            strengths=strengths or None,
            search=search,
            seeds=seeds,
            ray=ray,
            tell=progress.tell,
        )
    shown.show(report, console)
    print(f"Page: {out / 'compare.html'}")
    return 1 if report["failed"] else 0
