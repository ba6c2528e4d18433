"""Several processes of one command (torchrun), without loading torch where there is but one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def join() -> bool:
    """Join the processes that torchrun started, if any; whether this one prints and writes."""
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return True
    from holdfast.engine import processes

    processes.start()
    return processes.first()


def by_first(make: Callable[[], T]) -> T:
    """`hosts.processes.by_first`: what `make` gives (plain data) in the first process, in every process."""
    if "torch" not in sys.modules:
        return make()
    from holdfast.hosts import processes

    return processes.by_first(make)
