"""What goes into the linear maps of the untouched base: rows to run through it, and covariances of the inputs."""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from holdfast.engine.base import as_base
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.services import Context


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
    ctx: Context, maps: Mapping[str, Any], rows: Sequence[TokenRow], owner: str
) -> dict[str, torch.Tensor]:
    """For each linear map (n, n) fp32: mean over rows of X^T X, X (T, n) its inputs divided by the largest |X|.

    Rows run alone, without padding. Raises PlanError for a map that none of them reaches.
    """
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(maps, 0)

    def add(name: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not x.numel():
            return
        x = x / x.abs().max().clamp(min=1e-30)
        sums[name] = sums.get(name, 0) + x.T @ x
        counts[name] += 1

    with as_base(ctx.model):
        forward(ctx.model, rows[:1])  # a model is tried when it is first run, on rows of nobody
    with as_base(ctx.model), _watched(maps, add):
        for n, row in enumerate(rows):
            forward(ctx.model, [row])
            if ctx.tell:
                ctx.tell((n + 1) / len(rows), f"{owner}: inputs of the base's maps")
    missed = next((n for n in maps if not counts[n]), None)
    if missed:
        what = f"{owner} saw no input of {missed} on {len(rows)} rows."
        raise PlanError(what, f"Leave it out of {owner}.target_modules, or take more rows.")
    return {name: sums[name] / counts[name] for name in maps}


@contextmanager
def _watched(maps: Mapping[str, Any], see: Any) -> Any:
    """Call `see` with the name of a map and its input, for every call of a map."""
    with ExitStack() as stack:
        for name, module in maps.items():
            handle = module.register_forward_pre_hook(lambda _m, args, name=name: see(name, args[0]))
            stack.callback(handle.remove)
        yield
