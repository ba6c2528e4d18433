"""One recipe with several seeds: a run for each, in a folder of its own, and a verdict about the recipe.

The seeds change everything that is drawn in training (order of the rows, an adapter's start, anchors); the rows
that are trained on and measured are the same. The base is loaded and measured once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, RecipeError
from holdfast.files import write_json, write_text
from holdfast.measure import recipes, stats
from holdfast.measure.compare import verdict
from holdfast.measure.stats import Estimate
from holdfast.recipe import KEEP_FRAC, Recipe
from holdfast.report import markdown, page
from holdfast.runs.bases import Bases
from holdfast.runs.budget import asked_to_keep
from holdfast.runs.folder import LAST
from holdfast.runs.run import Run, Tell

SUMMARY = "seeds.json"


def check_seeds(recipe: Recipe, seeds: int) -> None:
    """Raise RecipeError for what several seeds cannot be."""
    if seeds < 2:
        raise RecipeError(
            f"--seeds {seeds} is no statement about a recipe.", "Give 2 or more (3 prove much), or none."
        )
    if recipe.measure.skip_before:
        raise RecipeError("measure.skip_before leaves nothing that could be kept over seeds.", "Remove it.")
    if recipe.export.folder:
        what = f"export.folder {recipe.export.folder} can hold one model, and {seeds} seeds make {seeds}."
        raise RecipeError(what, "Remove it: each run exports into its own folder.")
    if recipe.export.push_to_hub:
        what = f"export.push_to_hub {recipe.export.push_to_hub} can hold one model, and {seeds} seeds make {seeds}."
        raise RecipeError(what, "Remove it, and upload one of the runs with `hf upload`.")


def runs_of(recipe: Recipe, base_dir: Path, seeds: int, tell: Tell) -> Iterator[Run]:
    """The runs, one after the other; they share their rows and the base."""
    bases = Bases()
    for n in range(seeds):
        seed = recipe.training.seed + n
        place = str(Path(recipe.training.output_dir) / f"seed-{seed}")
        order = recipe.training.data_seed
        changed = {"seed": seed, "output_dir": place, "data_seed": order if order is None else order + n}
        training = recipe.training.model_copy(update=changed)
        data = recipe.data.model_copy(update={"seed": recipe.seed_of_rows})
        mine = recipe.model_copy(update={"training": training, "data": data})
        yield Run(mine, base_dir, _named(tell, f"seed {seed} ({n + 1} of {seeds})"), bases=bases)


def _named(tell: Tell, label: str) -> Tell:
    return lambda phase, share, words: tell(phase, share, f"{label}  {words}")


def summarised(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """Judge the recipe from its finished runs; writes seeds.json, seeds.html and seeds.md.

    The report is that of the first run, with the abilities, the task and the verdict of all.
    """
    _check_alike(runs)
    reports = [json.loads((run.path / LAST).read_text(encoding="utf-8")) for run in runs]
    abilities, task = _abilities(runs), _task([r["task"] for r in reports])
    seeds = ", ".join(str(run.recipe.training.seed) for run in runs)
    said = f"Over seeds {seeds}: a verdict about the recipe; what is shown of the training is of the first"
    each = [_of_one(run, r) for run, r in zip(runs, reports, strict=True)]
    missed = ", ".join(str(one["seed"]) for one in each if one["budget"] and one["budget"]["met"] is False)
    unmet = f"the budget is not met with seeds {missed}" if missed else ""
    task["note"] = "; ".join(filter(None, [said, unmet, task.get("note")]))
    report = {
        **reports[0],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "verdict": verdict(abilities, task, asked_to_keep(runs[0].recipe)),
        "abilities": abilities,
        "task": task,
        "seeds": each,
    }
    page.write(report, folder / "seeds.html")
    write_text(folder / "seeds.md", markdown.summary(report))
    write_json(folder / SUMMARY, report)
    return report


def _check_alike(runs: Sequence[Run]) -> None:
    """Raise HoldfastError where two runs were measured by different versions or machines: their base's answers differ
    for reasons that are none of the recipe's."""
    made = [run.folder.read("after.json").get("made") for run in runs]
    other = next((n for n, own in enumerate(made) if own != made[0]), None)
    if other is not None:
        what = f"{runs[other].path} was measured by other versions or on another machine than {runs[0].path}."
        raise HoldfastError(what, "Remove one of the two folders and start again: it is trained and measured anew.")


def _abilities(runs: Sequence[Run]) -> list[dict[str, Any]]:
    before = runs[0].folder.read("before.json")
    afters = [run.folder.read("after.json")["abilities"] for run in runs]
    return recipes.abilities(before["abilities"], afters, runs[0].recipe.measure.floors, KEEP_FRAC)


def _task(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def over(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sides = {k: [Estimate.from_dict(p[k]) for p in parts] for k in ("after", "difference")}
        return {**parts[0], **{k: stats.mean_of_runs(each).to_dict() for k, each in sides.items()}}

    others = zip(*[t["others"] for t in tasks], strict=True)
    return {**over(tasks), "others": [over(parts) for parts in others]}


def _of_one(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """One run in a line: seed, its own verdict, and where its model lies."""
    kept = {a["name"]: a["retention"] and a["retention"]["value"] for a in report["abilities"]}
    own = {"seed": run.recipe.training.seed, "status": report["verdict"]["status"], "path": report["tuned"]["path"]}
    own["budget"] = report["training"]["budget"]
    return {**own, "task": report["task"]["after"]["value"], "kept": kept}
