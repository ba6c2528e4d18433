"""repair: give a tuned model its abilities back by merging, and show what that costs the task.

The folder OUT is a run folder: the same command goes on where it was (measurements are kept in the cache by content),
and a finished one does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.errors import HoldfastError
from holdfast.files import write_text
from holdfast.report.progress import progress_on
from holdfast.runs.run import Tell, silent
from holdfast.verbs.check import floors_of

EXIT = {"kept": 0, "lost": 1, "not met": 1, "unclear": 3}


def repair(
    base: str,
    tuned: str,
    out: str | Path,
    *,
    keep: Mapping[str, float] | None = None,
    tell: Tell = silent,
    **wish: Any,
) -> dict[str, Any]:
    """Search merges of `base` and `tuned` for the best task score that keeps `keep`; write the best to `out`/model.

    Where `tuned` is an adapter and the best merge only scales its change, `out`/adapter has it as an adapter too.

    keep: ability -> share of the base's score, by default in-context and `recipe.KEEP_FRAC`. `wish`: the other fields
    of `runs.repair.Wish`.

    Returns what stands in `out`/repair.json.

    Raises:
        HoldfastError: the models are no relatives, the data do not fit, or the base shows nothing that could be kept.
    """
    from holdfast.report import repair as shown
    from holdfast.runs.repair import Wish, repaired

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise HoldfastError("repair works in one process, and torchrun started several.", "Start it without torchrun.")
    lists = {k: tuple(v) for k, v in wish.items() if isinstance(v, list)}
    asked = Wish(base, tuned, **({"keep": dict(keep)} if keep else {}), **{**wish, **lists})
    report = repaired(asked, Path(out), tell)
    for name, text in (("repair.md", shown.markdown), ("repair.html", shown.page)):
        write_text(Path(out) / name, text(report))
    return report


def command(base: str, tuned: str, *, keep: Sequence[str], out: Path, **wish: Any) -> int:
    """`holdfast repair`: the curve and the verdict on the terminal and in files, and an exit code."""
    from holdfast.report import repair as shown

    floors = floors_of(keep)
    console = Console()
    with progress_on(console) as progress:
        report = repair(base, tuned, out, keep=floors, tell=progress.tell, **wish)
    shown.show(report, console)
    adapter = f"\nAdapter: {report['adapter']}" if report.get("adapter") else ""
    print(f"Model: {report['model']}{adapter}\nPage: {out / 'repair.html'}")
    return EXIT[report["status"]]
