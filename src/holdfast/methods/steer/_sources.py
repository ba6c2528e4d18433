"""What methods that weigh the sources of the data share: general text of their own, and rows that never train."""

from collections.abc import Sequence

from holdfast.data.mix import Mix, Source
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.methods.data._few import few
from holdfast.methods.data.replay import read_sources
from holdfast.services import Context


def with_text(mix: Mix, ctx: Context, name: str, sources: Sequence[str], share: float) -> Mix:
    """The mix with `share` of general text as the source `name`; rows without a target are left out."""
    if not share:
        return mix
    cut = (r.cut(ctx.max_length) for r in read_sources(sources, ctx, owner="task", source=name))
    return mix.add(Source(name, [r for r in cut if r.scored.any()], share))


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
