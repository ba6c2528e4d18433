"""Live progress of a run: one bar per phase on a terminal, plain lines everywhere else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

NAMES = {
    "load": "Loading the model",
    "measure before": "Measuring before",
    "prepare": "Preparing the plan",
    "rates": "Trying learning rates",
    "tune": "Tuning",
    "measure after": "Measuring after",
    "measure": "Measuring",
    "search": "Searching",
    "heal": "Healing",
    "second look": "Looking again",
    "export": "Writing the model",
    "check": "Checking the plans",
    "compare": "Comparing",
    "gguf": "Converting to GGUF",
    "upload": "Uploading",
    "diagnose": "Looking for the cause",
}


def progress_on(console: Console) -> Bars | Lines:
    """What fits the console: bars that move on a terminal, lines in a pipe or a log."""
    return Bars(console) if console.is_terminal else Lines(console)


class Bars(AbstractContextManager["Bars"]):
    """A context manager whose `tell(phase, share, words)` moves the phase's bar."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("{task.description:20}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}", markup=False),
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


class Lines(AbstractContextManager["Lines"]):
    """The same without a terminal: a line when a phase starts, and one for every tenth of the training."""

    def __init__(self, console: Console):
        self._console, self._phase, self._tenth = console, "", 0

    def __exit__(self, *_: object) -> None:
        return None

    def tell(self, phase: str, share: float, words: str) -> None:
        if phase == "done":
            return
        if phase != self._phase:
            self._phase, self._tenth = phase, 0
            self._print(NAMES.get(phase, phase))
        tenth = int(10 * share + 1e-9)
        if phase == "tune" and tenth > self._tenth:
            self._tenth = tenth
            self._print(f"  {share:4.0%}  {words}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
