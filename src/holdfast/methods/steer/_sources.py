"""What methods that weigh the sources of the data share: general text of their own, and rows that never train."""

from collections.abc import Mapping, Sequence

import torch

from holdfast.data.mix import Mix, Source
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.methods.data._few import few
from holdfast.methods.data.replay import cut_rows, read_sources
from holdfast.services import Context


def with_text(mix: Mix, ctx: Context, name: str, sources: Sequence[str], share: float) -> Mix:
    """The mix with `share` of general text as the source `name`; rows without a target are left out."""
    if not share:
        return mix
    rows = read_sources(sources, ctx, owner="task", source=name)
    return mix.add(Source(name, cut_rows(rows, ctx.max_length, name, ctx), share))


def looked_at(mix: Mix, ctx: Context, name: str, most: int, does: str) -> dict[str, Sequence[TokenRow]]:
    """source -> at most so many of its rows that never train.

    does: what the method does with sources, for the message.

    Raises:
        PlanError: fewer than two sources have such rows.
    """
    found = {source: few(rows, most, f"{name}/{source}", ctx) for source, rows in mix.held_out().items()}
    if len(found) < 2:
        raise PlanError(
            f"{name} {does} sources of the data, but has rows to look at of {', '.join(found) or 'none'} alone.",
            f"Put Replay into the plan, set {name}.share, or raise {name}.cut.",
        )
    return found


def weighing_one(weights: torch.Tensor, names: Sequence[str], parts: Mapping[str, float]) -> torch.Tensor:
    """(K,) weights of sources, scaled so that a token of the mix weighs 1 on average: sum_k part_k w_k / sum_k part_k.

    parts: of the mix, by source; where one of `names` is not among them each source counts as much.
    """
    known = all(parts.get(n, 0.0) > 0 for n in names)
    part = torch.tensor([parts[n] if known else 1.0 for n in names], dtype=weights.dtype)
    return weights * (part.sum() / (part @ weights))
