"""Several forwards of one model at once on a CPU, each with its share of the threads.

Most operations of a forward are too small to keep several threads busy, and each ends with a wait for the slowest.
Forwards beside each other do not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from holdfast.engine.trial import moves
from holdfast.engine.ways import inner

T = TypeVar("T")
R = TypeVar("R")


def may_share(model: Any) -> bool:
    """Whether forwards of `model` may run at once: on a CPU, and none leaves anything behind in the model."""
    core = inner(model)
    moved = any(moves(m) for m in core.modules())
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1  # may talk in a forward
    hooked = getattr(core, "hf_device_map", None) or any(_hooks(m) for m in core.modules())
    quantised = getattr(core, "is_quantized", False)  # its layers set themselves up in their first forward
    return core.device.type == "cpu" and not (moved or several or hooked or quantised)


def _hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def side_by_side(work: Callable[[T], R], todo: Sequence[T], at_once: int) -> Iterator[R]:
    """work(x) for each x, `at_once` of them at a time, in order. No gradients; autocast as it is here."""
    threads = torch.get_num_threads()
    at_once = min(at_once, threads)
    if at_once < 2:
        yield from map(work, todo)
        return
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(x: T) -> R:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            return work(x)

    crew = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,))
    try:
        yield from crew.map(alone, todo)
    finally:
        crew.shutdown(cancel_futures=True)
