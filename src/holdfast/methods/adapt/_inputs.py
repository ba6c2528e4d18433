"""What goes into the linear maps of the untouched base: rows to run through it, and covariances of the inputs."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from holdfast.engine.base import as_base
from holdfast.engine.forward import forward
from holdfast.engine.inputs import watched
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.methods.adapt._matrices import inputs_of
from holdfast.services import Context

MOST = 8 * 2**30  # bytes of covariances at a time


def task_rows(ctx: Context, owner: str, count: int, most: int) -> list[TokenRow]:
    """Up to `count` of the task's rows, drawn by the seed of the run, the first `most` tokens of each.

    Raises:
        PlanError: the host knows no text of the task.
    """
    from holdfast.data.tokens import tokenize_all

    if not ctx.rows:
        what = f"{owner} runs the task's rows through the base before training, but no text of them is known."
        raise PlanError(what, "Give prompt/completion rows, or another method.")
    rows = sorted(ctx.rows, key=lambda r: (r.prompt, r.completion))
    random.Random(f"{owner}/{ctx.seed}").shuffle(rows)
    return [r.cut(most) for r in tokenize_all(rows[:count], ctx.tokenizer, None)]


def general_rows(ctx: Context, owner: str, sources: Sequence[str], count: int, most: int) -> list[TokenRow]:
    """As `task_rows`, of general data files; every token is a target."""
    from holdfast.methods.data.replay import read_sources

    rows = [r.cut(most) for r in read_sources(sources, ctx, owner=owner, all_tokens=True)[:count]]
    return [r for r in rows if r.scored.any()]


@torch.no_grad()
def covariances(
    ctx: Context, maps: Mapping[str, Any], rows: Sequence[TokenRow], owner: str, most: int = MOST
) -> Iterator[tuple[str, torch.Tensor]]:
    """For each linear map (n, n) fp32: mean over rows of X^T X, X (T, n) its inputs divided by the largest |X|.

    One at a time, so that whoever asks may let go of it. Rows run alone, without padding, once for every group of maps
    whose covariances take `most` bytes.

    Raises:
        PlanError: a map that no row reaches, or whose inputs are all 0 or not finite.
    """
    with as_base(ctx.model):
        forward(ctx.model, rows[:1])  # a model is tried when it is first run, on rows of nobody
    groups = list(grouped(maps, most))
    for number, group in enumerate(groups):
        sums, counts = _sums(ctx, group, rows, owner, number / len(groups), 1 / len(groups))
        for name in group:
            if not counts[name]:
                what = f"{owner} saw no input of {name} on {len(rows)} rows."
                raise PlanError(what, f"Leave it out of {owner}.target_modules, or take more rows.")
            size = sums[name].trace()
            if not size.isfinite() or not size:
                what = f"{owner} cannot measure {name}: its inputs are {'all 0' if not size else 'not all finite'}."
                raise PlanError(what, f"Leave it out of {owner}.target_modules, or load the model in another dtype.")
            yield name, sums.pop(name).div_(counts[name])


def _sums(
    ctx: Context, maps: Mapping[str, Any], rows: Sequence[TokenRow], owner: str, done: float, share: float
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """X^T X of each map summed over its calls, and how many calls these were."""
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(maps, 0)

    def add(name: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not x.numel():
            return
        x = x / x.abs().max().clamp(min=1e-30)
        if name not in sums:
            sums[name] = x.new_zeros(x.shape[1], x.shape[1])
        sums[name].addmm_(x.T, x)
        counts[name] += 1

    with as_base(ctx.model), watched(maps, add):
        for n, row in enumerate(rows):
            forward(ctx.model, [row])
            if ctx.tell:
                ctx.tell(done + share * (n + 1) / len(rows), f"{owner}: inputs of the base's maps")
    return sums, counts


def grouped(maps: Mapping[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """The maps in order, as many together as have covariances of up to `most` bytes, at least one."""
    part: dict[str, Any] = {}
    size = 0
    for name, m in maps.items():
        own = 4 * inputs_of(m) ** 2
        if part and size + own > most:
            yield part
            part, size = {}, 0
        part[name], size = m, size + own
    if part:
        yield part
