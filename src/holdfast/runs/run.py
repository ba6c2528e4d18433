"""What every part of a run has at hand: the recipe, its folder, who is told how far it is, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.recipe import Recipe
from holdfast.runs.bases import Bases
from holdfast.runs.folder import RunFolder

Tell = Callable[[str, float, str], None]  # phase, share done (0..1), words beside the bar
# WORK is what a mended recipe would spoil
WORK = {"before.json", "probe.json", "checkpoint", "checkpoint.old", "model", "training.json"}


def silent(phase: str, share: float, words: str) -> None:
    """A `Tell` for nobody."""


@dataclass
class Run:
    """One run of a recipe, wherever it stands. Making one touches no file.

    Attributes:
        recipe: with absolute paths where they were relative.
        base_dir: the folder that relative paths of methods start from.
        tell: hears phase, share done and words.
        timing: seconds of each phase so far.
        halved: whether what chooses anything sees one half of items and rows alone, as others report on the rest.
        bases: where the base comes from that it shares with other runs; None: it loads one.
    """

    recipe: Recipe
    base_dir: Path
    tell: Tell = silent
    timing: dict[str, float] = field(default_factory=dict)
    halved: bool = False
    bases: Bases | None = None

    def __post_init__(self) -> None:
        self.folder = RunFolder(Path(self.recipe.training.output_dir), self.recipe, WORK)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def export(self) -> Path:
        """Where the tuned model goes."""
        elsewhere = self.recipe.export.folder
        return Path(elsewhere) if elsewhere else self.path / "model"

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds inside to `phase`."""
        start = time.perf_counter()
        yield
        self.timing[phase] = self.timing.get(phase, 0.0) + time.perf_counter() - start
