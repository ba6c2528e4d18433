"""Whether what lies in an export folder is what a run has written there: two runs may be told the same folder."""

from __future__ import annotations

from holdfast import models
from holdfast.errors import TrainingError
from holdfast.runs.run import Run
from holdfast.runs.several import by_first

WRITTEN = "export.json"  # in the run folder: which model was written


def note_export(run: Run) -> None:
    """Write down which model the run has just exported."""
    run.folder.write(WRITTEN, {"sha": by_first(lambda: models.resolve(str(run.export)).sha)})


def own_export(run: Run) -> models.ModelSource:
    """What lies in the run's export folder, which is what the run has written there.

    Raises:
        TrainingError: another run has written over it.
    """
    source, written = models.resolve(str(run.export)), run.folder.read(WRITTEN)
    if written and written["sha"] != source.sha:
        what = f"{run.export} holds another model than the run in {run.path} has written there."
        raise TrainingError(what, "Give each run an export.folder of its own, and train this one again.")
    return source
