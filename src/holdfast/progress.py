"""Live progress of a run: one bar per phase, with the time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

NAMES = {
    "load": "Loading the model",
    "measure before": "Measuring before",
    "prepare": "Preparing the plan",
    "tune": "Tuning",
    "measure after": "Measuring after",
}


class Bars:
    """A context manager whose `tell(phase, share, words)` moves the phase's bar."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("{task.description:20}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
            console=console,
        )
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, phase: str, share: float, words: str) -> None:
        if phase == "done":
            for bar in self._bars.values():
                self._progress.update(bar, completed=1.0)
            return
        if phase not in self._bars:
            for bar in self._bars.values():
                self._progress.update(bar, completed=1.0)
            self._bars[phase] = self._progress.add_task(NAMES.get(phase, phase), total=1.0, words="")
        self._progress.update(self._bars[phase], completed=share, words=words)
