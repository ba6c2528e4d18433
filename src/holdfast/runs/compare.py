"""compare: what is refused at once, whose folder it is, and where the runs are done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.errors import RecipeError
from holdfast.runs.cluster import check_ray
from holdfast.runs.comparison import LAST, Comparison, Wish
from holdfast.runs.comparison_there import ComparisonThere
from holdfast.runs.contestants import check_seeds
from holdfast.runs.grid import check_grid
from holdfast.runs.run import Tell, silent
from holdfast.runs.search import check_search


def compare(wish: Wish, base_dir: Path, out: Path, tell: Tell = silent, ray: bool = False) -> dict[str, Any]:
    """Run the comparison in the folder `out`, from wherever it stands; returns what stands in its compare.json.

    ray: let the runs be done on a Ray cluster, whose machines must all see `out`.

    Raises:
        HoldfastError: one clear message for what a user can mend, before any training.
    """
    check_search() if wish.search else check_grid(wish.factors, wish.strengths)
    check_seeds(wish.seeds)
    if ray:
        check_ray()
    here = Comparison(wish, base_dir, out, tell)
    if here.recipe.measure.skip_before:
        what = "measure.skip_before leaves nothing to compare with: what was kept is a share of the base's score."
        raise RecipeError(what, "Remove it.")
    folder = here.folder
    if folder.finished and not folder.read(LAST)["failed"]:
        return folder.read(LAST)
    folder.claim()
    if not ray:
        return here.run()
    there = ComparisonThere(wish, base_dir, out, tell)
    try:
        return there.run()
    finally:
        there.cluster.close()
