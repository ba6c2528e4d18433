"""Work spread over a Ray cluster (`--ray`): the one that RAY_ADDRESS names, else one of this machine alone.

A task takes one GPU where the cluster has any, with its share of that machine's CPUs, else a share of all CPUs. Ray
decides where and when it runs. A task that loses its worker is not run again by itself: a run folder knows where it
stands, and the same command goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from holdfast.errors import HoldfastError, TrainingError, pip_install

HOME = "HOLDFAST_HOME"


def check_ray() -> None:
    """Raise HoldfastError where Ray is not installed."""
    if find_spec("ray") is None:
        raise HoldfastError("--ray needs the package ray, which is not installed.", f"Run: {pip_install('ray')}.")


class Cluster:
    """Tasks on a cluster, each called by a name; to be closed.

    Args:
        most: how many of them there will be at a time, at the most.
    """

    def __init__(self, most: int):
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray is imported
        ray: Any = import_module("ray")  # by name: type checkers would read all of it

        self._ray, self._mine = ray, not ray.is_initialized()
        if self._mine:
            env = {"env_vars": {HOME: os.environ[HOME]}} if HOME in os.environ else {}
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=env)
        self._needs = share([n["Resources"] for n in ray.nodes() if n["Alive"]], most)
        self._tasks: dict[Hashable, Any] = {}

    def submit(self, name: Hashable, work: Callable[..., Any], *given: Any) -> None:
        """Let `work(*given)` be done somewhere, once its turn comes."""
        self._tasks[name] = self._ray.remote(max_retries=0, **self._needs)(work).remote(*given)

    def has(self, name: Hashable) -> bool:
        """Whether such a task was submitted and nobody has its result yet."""
        return name in self._tasks

    def result(self, name: Hashable) -> Any:
        """What it returned, as soon as it has; its error is raised here.

        Raises:
            TrainingError: its worker was lost.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(self._tasks.pop(name))
        except errors.RayTaskError as e:
            raise e.cause from None
        except errors.RayError as e:
            what = f"Ray lost the worker of this run ({type(e).__name__})."
            raise TrainingError(
                what, "Look at the memory of that machine; the same command tries the run again."
            ) from e

    def close(self) -> None:
        """Stop what still runs, and Ray where it was started here."""
        for task in self._tasks.values():
            self._ray.cancel(task, force=True)
        if self._mine:
            self._ray.shutdown()


def share(machines: list[Mapping[str, float]], most: int) -> dict[str, int]:
    """What a task needs of these machines ("GPU", "CPU" of each), when there are `most` tasks."""
    with_gpu = [m for m in machines if m.get("GPU", 0) >= 1]
    if with_gpu:
        return {"num_gpus": 1, "num_cpus": max(1, min(int(m.get("CPU", 1) // m["GPU"]) for m in with_gpu))}
    cpus = [int(m.get("CPU", 0)) for m in machines]
    return {"num_cpus": max(1, min(sum(cpus) // most, max(cpus, default=1)))}
