"""What the processes of one run tell each other (`torchrun`); a run of one process passes through for nothing.

Every process holds the whole model, draws the same rows and takes the same steps. Of the rows of a step each computes
its share; what they find is added up, and only the first writes files. The loss of a row is divided by counts of the
whole step, so a plain sum of gradients is the gradient of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from holdfast import errors
from holdfast.engine.pack import TokenRow
from holdfast.engine.processes import gather, shares, told, world
from holdfast.hosts.losses import Parts, numbers

T = TypeVar("T")
BUCKET = 1 << 24  # numbers sent at once


def deal(batch: Sequence[TokenRow], asides: Sequence[TokenRow], pieces: int) -> tuple[list[list[TokenRow]], float]:
    """This process's micro-batches of a step, at most `pieces` and none empty, and one's part of a penalty."""
    rank, num = world()
    whole = [(list(batch), list(asides))] if num == 1 else _by_length(batch, asides, num)
    cut = [[[*x, *y] for x, y in zip(dealt(b, pieces), dealt(a, pieces), strict=True) if x or y] for b, a in whole]
    return cut[rank], 1 / max(1, sum(len(micros) for micros in cut))


def dealt(rows: Sequence[TokenRow], pieces: int) -> list[list[TokenRow]]:
    """Rows dealt in turn over so many pieces; those of one group go together, where its first row goes."""
    places: dict[Any, int] = {}
    out: list[list[TokenRow]] = [[] for _ in range(pieces)]
    for n, row in enumerate(rows):
        out[places.setdefault(_together(n, row), len(places)) % pieces].append(row)
    return out


def _together(place: int, row: TokenRow) -> Any:
    """What rows have in common that must not be parted; a row without a group stands for itself."""
    return place if row.group is None else (row.owner, row.group)


def _by_length(
    batch: Sequence[TokenRow], asides: Sequence[TokenRow], num: int
) -> list[tuple[list[TokenRow], list[TokenRow]]]:
    """The rows of each process, about as many tokens each: a step takes as long as its slowest process."""
    rows = [*batch, *asides]
    parts = shares([_together(n, r) for n, r in enumerate(rows)], [len(r.ids) for r in rows], num)
    return [([rows[i] for i in p if i < len(batch)], [rows[i] for i in p if i >= len(batch)]) for p in parts]


@torch.no_grad()
def add_up(params: Sequence[torch.nn.Parameter], parts: Sequence[Parts]) -> Sequence[Parts]:
    """Sum the gradients of a step over processes, in place, and its loss parts, which are returned.

    A weight that no process reached keeps no gradient, as in one process: the optimizer leaves it alone.
    """
    if world()[1] == 1:
        return parts
    said = gather([dict(numbers(parts)), "".join("1" if p.grad is not None else "0" for p in params)])
    reached = [p for p, *had in zip(params, *(mask for _, mask in said), strict=True) if "1" in had]
    for p in reached:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for bucket in _buckets([p.grad for p in reached if p.grad is not None]):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(summed.view_as(g))
    whole: Counter[str] = Counter()
    for theirs, _ in said:
        whole.update(theirs)
    return [{name: torch.tensor(value, dtype=torch.float64) for name, value in whole.items()}]


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type and device, joined up to BUCKET numbers."""
    bucket: list[torch.Tensor] = []
    for t in tensors:
        full = sum(b.numel() for b in bucket) + t.numel() > BUCKET
        if bucket and (full or (t.dtype, t.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


@torch.no_grad()
def same_start(tensors: Mapping[str, torch.Tensor]) -> None:
    """Give every process the first one's tensors: libraries may round differently on unlike machines."""
    if world()[1] > 1:
        on = None if "gloo" in dist.get_backend() else torch.accelerator.current_accelerator()
        for t in tensors.values():
            sent = t.contiguous().to(on or t.device)
            dist.broadcast(sent, 0)
            if sent.data_ptr() != t.data_ptr():
                t.copy_(sent)


def seed(number: int, step: int) -> None:
    """Dropout of its own for every process but the first, whose generator a checkpoint holds."""
    rank = world()[0]
    if rank:
        torch.manual_seed((number + rank) * 1_000_003 + step)


def agree(step: int, where: Any) -> None:
    """Raise TrainingError in every process unless all of them would start at the same step."""
    steps = gather(step)
    if len(set(steps)) > 1:
        raise errors.TrainingError(
            f"The processes found different checkpoints in {where} (steps {steps}).",
            "Put training.output_dir where all of them can read it.",
        )


def union(effects: Counter[str]) -> Counter[str]:
    """The most any process counted: a method may have worked on the rows of one alone."""
    return effects if world()[1] == 1 else reduce(or_, (Counter(e) for e in gather(dict(effects))))


def by_first(make: Callable[[], T]) -> T:
    """What `make` gives (plain data) in the first process, in every process; its error too, so that nobody waits."""
    if world()[1] == 1:
        return make()

    def attempt() -> list[Any]:
        try:
            return [make(), None]
        except (errors.HoldfastError, OSError) as e:
            kind = type(e).__name__ if isinstance(e, errors.HoldfastError) else "HoldfastError"
            return [None, [kind, getattr(e, "what", f"{e}."), getattr(e, "cure", "")]]

    value, wrong = told(attempt)
    if wrong:
        raise getattr(errors, wrong[0])(*wrong[1:])
    return value
