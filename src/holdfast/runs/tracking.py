"""Experiment trackers of a run, through accelerate's own: what they are told, and that they stay on this machine.

Nothing is imported or computed without `training.report_to`. Files go to `trackers/` in the run folder. What a tracker
reads from the environment stays as the user set it; nothing set means offline and without telemetry.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import RecipeError, pip_install
from holdfast.hosts.plain import Log

FOLDER = "trackers"  # in the run folder


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker that is not installed."""
    for name in names:
        if not find_spec(name):
            what = f"training.report_to names {name}, and it is not installed."
            raise RecipeError(what, f"Run: pip install {name}, or {pip_install('trackers')} for all of them.")


class Trackers:
    """The trackers of a run, opened when there is something to tell; for the first process alone.

    One that fails is dropped with a warning: it must not end a run.

    Args:
        names: of `training.report_to`; none: every call does nothing.
        folder: of the run.
        settings: the recipe's, in sections.
        name: of the run; None: that of its folder.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], name: str | None = None):
        self.names, self.folder, self.settings = tuple(names), folder, settings
        self.name = name or folder.absolute().name
        self._open: dict[str, Any] | None = None
        self._before: tuple[float, int] | None = None  # seconds and tokens at the line before

    def step(self, step: int, parts: Mapping[str, float], log: Log) -> None:
        """Tell of a finished step: loss and terms, learning rate, gradient norm, speed and memory."""
        if not self.names:
            return
        values = {"train/loss" if k == "task" else f"train/{k}": v for k, v in parts.items()}
        values["train/learning_rate"] = log.rate
        if log.norm is not None:
            values["train/grad_norm"] = float(log.norm)
        now = (time.perf_counter(), log.tokens)
        if self._before:
            seconds, tokens = (a - b for a, b in zip(now, self._before, strict=True))
            values["train/tokens_per_second"] = tokens / max(seconds, 1e-9)
        self._before = now
        self.tell(step, {**values, "train/memory_gb": _memory()})

    def look(self, step: int, finding: Mapping[str, float], seconds: float) -> None:
        """Tell of a look, whose seconds are not training's."""
        if self._before:
            self._before = (self._before[0] + seconds, self._before[1])
        self.tell(step, {f"eval/{k}": v for k, v in finding.items()})

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """Tell any values of a step."""
        if self._open is None:
            self._open = {}
            for name in self.names:
                self._try(name, lambda name=name: self._start(name, step))
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(dict(values), step=step))

    def finish(self) -> None:
        """Close what was opened."""
        for name, tracker in list((self._open or {}).items()):
            self._try(name, tracker.finish)
        self._open = {}

    def _try(self, name: str, do: Callable[[], Any]) -> None:
        assert self._open is not None
        try:
            do()
        except Exception as error:  # whatever a tracker raises
            self._open.pop(name, None)
            warnings.warn(f"The tracker {name} failed ({error}); the run goes on without it.", stacklevel=2)

    def _start(self, name: str, step: int) -> None:
        assert self._open is not None
        place = (self.folder / FOLDER).absolute()
        place.mkdir(parents=True, exist_ok=True)
        for key, value in at_home(place).items():
            os.environ.setdefault(key, value)
        tracker = self._open[name] = _made(name, self.name, place, step)
        tracker.start()
        tracker.store_init_configuration(_flat(self.settings))


def at_home(place: Path) -> dict[str, str]:
    """Environment variables that keep what is told on this machine, in `place`."""
    database = "sqlite:///" if find_spec("sqlalchemy") else "file:"
    return {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(place),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false",
        "TRACKIO_DIR": str(place / "trackio"),
        "MLFLOW_TRACKING_URI": f"{database}{place / ('mlflow.db' if find_spec('sqlalchemy') else 'mlruns')}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "DO_NOT_TRACK": "1",
    }


def _made(name: str, run: str, place: Path, step: int) -> Any:
    """accelerate's tracker; a run that goes on replaces what TensorBoard was told after its checkpoint."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    threads = torch.get_num_threads()
    PartialState()  # accelerate's log asks for it; it may set the number of threads
    torch.set_num_threads(threads)
    more = {
        "tensorboard": {"logging_dir": place, "purge_step": step},
        "mlflow": {"logging_dir": (place / "mlflow").as_uri()},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](run, **more.get(name, {}))
    tracker.main_process_only = False  # only the first process makes one
    return tracker


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Dotted names to plain values; lists as text."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{before}{key}.")
        else:
            out[f"{before}{key}"] = value if isinstance(value, str | bool | int | float) else str(value)
    return out


def _memory() -> float:
    """Most memory used so far in GB: of the accelerator, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
