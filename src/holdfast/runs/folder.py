"""The run folder: it belongs to one recipe, and every finished piece of work is a file in it, whole or absent.

Whatever works in one (tune, and every verb that takes long) goes on at its last finished piece when it is started
again, and does nothing when all is there. Nothing here knows what the work is.

Several processes (torchrun) all ask; the first alone looks and writes, and tells the others. Importing this is cheap.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from holdfast.errors import HoldfastError, RecipeError, TrainingError
from holdfast.files import write_json
from holdfast.recipe import load_recipe
from holdfast.runs.several import by_first

RECIPE, INPUTS, LAST, LOG = "recipe.yaml", "inputs.json", "report.json", "log.jsonl"


class Order(Protocol):
    """What a folder belongs to: a recipe, or whatever else can be written down and compared."""

    def save(self, path: Path) -> None:
        """Write it down, to be read again and found equal."""
        ...


class JsonOrder:
    """An order that is a dataclass of plain data, whose lists are tuples in memory."""

    def save(self, path: Path) -> None:
        """Write it as JSON, which is YAML too."""
        path.write_text(json.dumps(asdict(cast(Any, self)), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Any:
        """A saved one; None where the file is of another kind (a recipe of `tune`)."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            lists = {k: tuple(v) for k, v in found.items() if isinstance(v, list)}
            return cls(**{**found, **lists})
        except (ValueError, TypeError, AttributeError):
            return None


class RunFolder:
    """The folder of one recipe.

    Args:
        path: where it lies or will lie.
        recipe: whose folder it is; what else than `tune` works in one has an order of its own kind.
        work: names of files and folders that a changed recipe would spoil.
        read: how a recipe of this kind is read again.
        last: the file that is written last.
        setting: what says where it lies, for messages.
    """

    def __init__(
        self,
        path: Path,
        recipe: Order,
        work: Collection[str],
        read: Callable[[Path], Any] = load_recipe,
        last: str = LAST,
        setting: str = "training.output_dir",
    ):
        self.path, self.recipe, self.work = path, recipe, frozenset(work)
        self._load, self._last, self._setting = read, last, setting

    # ---- whose it is

    @property
    def finished(self) -> bool:
        """Whether this recipe has its report, which is written last."""
        return by_first(lambda: (self.path / self._last).is_file() and self._same_recipe())

    @property
    def has_work(self) -> bool:
        """Whether there is something that a changed recipe would spoil."""
        return by_first(lambda: any((self.path / name).exists() for name in self.work))

    def claim(self) -> None:
        """Make the folder this recipe's own. Work that failed before its first piece leaves it to a mended recipe.

        Raises:
            RecipeError: it holds work of another recipe or files of somebody else, or it cannot be written.
        """
        by_first(self._claim)

    def keep_inputs(self, now: Mapping[str, Any]) -> None:
        """Write down what the work begins with, by content; work goes on only with what it began with.

        Args:
            now: name of an input ("model", "data") -> its identity.

        Raises:
            RecipeError: an input is not what the work here began with.
        """
        began = (self.read(INPUTS) if self.has_work else None) or {}
        for what in began:
            if began[what] != now.get(what):
                raise RecipeError(
                    f"The {what} of this recipe is no longer what the run in {self.path} began with.",
                    f"Choose another {self._setting}, or put it back as it was.",
                )
        self.write(INPUTS, now)

    def _same_recipe(self) -> bool:
        return (self.path / RECIPE).is_file() and self._recipe_there() == self.recipe

    def _recipe_there(self) -> Any:
        """Whose folder it is; None where that is of another kind."""
        try:
            return self._load(self.path / RECIPE)
        except HoldfastError:
            return None

    def _claim(self) -> None:
        try:
            self._refuse_others({p.name for p in self.path.iterdir()} if self.path.is_dir() else set())
            self.path.mkdir(parents=True, exist_ok=True)
            self.recipe.save(self.path / f"{RECIPE}.new")
            os.replace(self.path / f"{RECIPE}.new", self.path / RECIPE)
        except OSError as e:
            raise RecipeError(
                f"The run folder {self.path} cannot be written: {e.strerror or e}.",
                f"Check {self._setting}, its rights and the free disk space.",
            ) from e

    def _refuse_others(self, there: set[str]) -> None:
        more = there - {RECIPE, f"{RECIPE}.new"}
        if RECIPE not in there and more:
            raise RecipeError(
                f"The folder {self.path} is not empty and holds no Holdfast run.",
                f"Choose another {self._setting}.",
            )
        found = self._recipe_there() if RECIPE in there else None
        worked = there & self.work if found else more  # of what another kind leaves, nothing is known here
        if worked and found != self.recipe:
            raise RecipeError(
                f"The run folder {self.path} holds a run of another recipe (see its recipe.yaml).",
                f"Choose another {self._setting}, or remove the folder.",
            )

    # ---- what is in it

    def read(self, name: str) -> Any:
        """A finished piece, or None."""
        path = self.path / name
        return by_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)

    def write(self, name: str, value: Any) -> None:
        """Finish a piece: JSON, written whole or not at all."""
        by_first(lambda: write_json(self.path / name, value))

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl; for the first process alone.

        Work that goes on from a checkpoint writes the steps after it again; the last line counts.
        """
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as e:
            what = f"{self.path / LOG} could not be written: {e.strerror or e}."
            raise TrainingError(what, "Free some disk space and start the same command again.") from e

    def check_room(self, need: int, what: str) -> None:
        """Raise TrainingError unless the disk has `need` bytes free for `what` (plural)."""
        by_first(lambda: self._check_room(need, what))

    def _check_room(self, need: int, what: str) -> None:
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise TrainingError(
                f"{self.path} has {free / 1e9:.1f} GB free, but {what} need up to {need / 1e9:.1f} GB.",
                f"Free some disk space or choose another {self._setting}.",
            )
