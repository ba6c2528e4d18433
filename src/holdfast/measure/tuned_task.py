"""The user's task scored: the likeliest label, or the exact completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from holdfast.data.rows import Row
from holdfast.engine import BATCH_TOKENS
from holdfast.measure import shard
from holdfast.measure.scorer import Scorer


def score_task(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    *,
    soft_prompt: torch.Tensor | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Score rows: with labels the likeliest label wins, without them the greedy completion must be exact.

    Both count with the end that training puts behind them: "1" does not win where the model says "10". A completion
    that the vocabulary cannot write is never exact: its tokens may be, and the text they write is another.

    Several processes each score a share of the rows, and all get the whole.

    Returns per row {"id", "correct": 0 or 1, "logprob": of the right completion, "answer": label or None}.
    """
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, soft_prompt=soft_prompt, progress=progress)
    asked = labels or ("",)
    requests = [(r.prompt, y or r.completion) for r in rows for y in asked]
    splits = scorer.encoder.join(requests, end=True, wheres=[r.where for r in rows for _ in asked])
    scores = shard.score_tokens(scorer, scorer.fit(splits), [prompt for prompt, _ in requests])
    out = []
    for n, row in enumerate(rows):
        mine = scores[n * len(asked) : (n + 1) * len(asked)]
        if labels:
            best = max(range(len(labels)), key=lambda i: mine[i].logprob)
            right = labels.index(row.completion)
            item = {"correct": int(best == right), "logprob": mine[right].logprob, "answer": labels[best]}
        else:
            exact = mine[0].greedy and not scorer.encoder.lacks(splits[n].answer)
            item = {"correct": int(exact), "logprob": mine[0].logprob, "answer": None}
        out.append({"id": row.where or str(n), **item})
    return out
