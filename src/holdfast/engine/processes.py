"""Several processes of one program (torchrun, accelerate launch): who they are, and what they tell each other.

A single process passes through for nothing. Every process must come to the same calls, as with any collective. Plain
data travels as JSON: no pickle.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world(model: Any = None) -> tuple[int, int]:
    """(rank, number of processes) of torch.distributed; (0, 1) without it, or if `model` is not whole in each."""
    if not (dist.is_available() and dist.is_initialized()) or (model is not None and not is_whole(model)):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return world()[0] == 0


def is_whole(model: Any) -> bool:
    """Whether this process holds all weights of `model` (False for FSDP, ZeRO-3 and tensor parallelism)."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    split = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
    return not split and not any(isinstance(m, FullyShardedDataParallel) for m in model.modules())


def shares(keys: Sequence[Hashable], sizes: Sequence[int], num: int) -> list[list[int]]:
    """Indices of `keys` for each of `num` processes: equal keys stay together, sums of `sizes` are about equal."""
    weight: dict[Hashable, int] = {}
    for key, size in zip(keys, sizes, strict=True):
        weight[key] = weight.get(key, 0) + size
    load, owner = [0] * num, {}
    for key in sorted(weight, key=lambda k: -weight[k]):  # stable: the same in every process
        owner[key] = load.index(min(load))
        load[owner[key]] += weight[key]
    return [[n for n, key in enumerate(keys) if owner[key] == rank] for rank in range(num)]


def gather(value: T) -> list[T]:
    """The `value` (plain data) of every process, by rank, in every process."""
    if world()[1] == 1:
        return [value]
    on = torch.device("cpu") if "gloo" in dist.get_backend() else torch.accelerator.current_accelerator()
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long, device=on) for _ in range(world()[1])]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=on))
    room = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=on)  # all must send as much
    room[: len(mine)] = mine.to(on)
    parts = [torch.empty_like(room) for _ in lengths]
    dist.all_gather(parts, room)
    return [json.loads(p[: int(n)].cpu().numpy().tobytes()) for p, n in zip(parts, lengths, strict=True)]


def told(make: Callable[[], T]) -> T:
    """What `make` gives (plain data) in the first process, in every process: for files only that one may touch."""
    return gather(make() if first() else None)[0]  # type: ignore[return-value]


def gather_rows(mine: Sequence[torch.Tensor], lengths: Sequence[Sequence[int]], device: Any) -> list[torch.Tensor]:
    """(n, D) tensors of all processes joined, by rank; `lengths` are the rows that each of them brings."""
    rank = world()[0]
    said = gather([mine[0].shape[1], str(mine[0].dtype).removeprefix("torch.")] if mine else None)
    width, kind = next(s for s in said if s)
    out = []
    for r, counts in enumerate(lengths):
        whole = torch.cat(list(mine)) if r == rank and mine else None
        if whole is None:
            whole = torch.empty(sum(counts), width, dtype=getattr(torch, kind), device=device)
        dist.broadcast(whole, r)
        out.append(whole)
    return out


def start() -> None:
    """Join the processes that torchrun started (gloo on CPU, nccl on CUDA); only the first goes on printing.

    Does nothing in a single process or where somebody has joined them already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        return
    import atexit

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
