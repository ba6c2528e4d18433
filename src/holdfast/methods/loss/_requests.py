"""Plain requests among few-shot prompts, for a task whose rows go through the chat template.

A tuning on conversations meets every request in the form of its own rows, and few-shot prompts hold nothing there: on
made conversations the default plan kept 0.99 of in-context learning and 0.02 of instructions (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.data.rendered import Rendered
from holdfast.engine.pack import TokenRow
from holdfast.methods.data.replay import GENERAL, read_sources
from holdfast.services import Context

LONGEST = 128  # ours: tokens; what is longer is cut


def with_requests(shots: Sequence[TokenRow], ctx: Context, share: float, owner: str) -> list[TokenRow]:
    """`shots` with `share` of them replaced by requests with their answers, spread evenly, where the task is chat.

    Every token of a request counts. A host that only has tokens does not know, and gets the shots alone.
    """
    first = next(iter(ctx.rows), None)
    if not share or first is None or not isinstance(first.prompt, Rendered):
        return list(shots)
    rows = read_sources(GENERAL[:1], ctx, owner=owner, all_tokens=True)
    rows = [cut for cut in (r.cut(min(LONGEST, ctx.max_length)) for r in rows) if cut.scored.any()]
    out = list(shots)
    for n in range(len(out)):
        before, now = int(n * share), int((n + 1) * share)
        if now > before:
            out[n] = rows[before % len(rows)]
    return out
