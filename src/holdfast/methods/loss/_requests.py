"""Plain requests among few-shot prompts, for a task whose rows go through the chat template.

A tuning on conversations meets every request in the form of its own rows, and few-shot prompts hold nothing there: on
made conversations the default plan kept 0.99 of in-context learning and 0.02 of instructions (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.data.rendered import is_chat
from holdfast.engine.pack import TokenRow
from holdfast.methods.data.replay import GENERAL, cut_rows, read_sources
from holdfast.services import Context

LONGEST = 128  # ours: tokens; what is longer is cut


def with_requests(shots: Sequence[TokenRow], ctx: Context, share: float, owner: str) -> list[TokenRow]:
    """`shots` with `share` of them replaced by requests with their answers, spread evenly, where the task is chat.

    Every token of a request counts. A host that only has tokens does not know, and gets the shots alone.
    """
    out = list(shots)
    if not share or not is_chat(ctx.rows):
        return out
    rows = read_sources(GENERAL[:1], ctx, owner=owner, all_tokens=True, most=int(len(out) * share))
    rows = cut_rows(rows, min(LONGEST, ctx.max_length), owner, ctx)
    for n in range(len(out)):
        before, now = int(n * share), int((n + 1) * share)
        if now > before:
            out[n] = rows[before % len(rows)]
    return out
