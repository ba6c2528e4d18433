"""The user's task scored: the likeliest label, the probability of the reference answer, or the written text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from holdfast.data.encoder import Encoder
from holdfast.data.metric import METRICS, Metric
from holdfast.data.rows import Row
from holdfast.engine import BATCH_TOKENS, trial
from holdfast.measure import shard, stats
from holdfast.measure.compare import Part, estimates
from holdfast.measure.generate import batch_for, spoken
from holdfast.measure.probe import Probe
from holdfast.measure.scorer import Scorer

SHORTEST, LONGEST = 16, 512  # of what may be written where nobody says how much
BESIDE = {"loss": ("loss_per_byte", "exact_match"), "loss_per_byte": ("loss",), "exact_match": ("loss",)}
Items = Sequence[Mapping[str, Any]]


def score_task(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    *,
    soft_prompt: torch.Tensor | None = None,
    batch_tokens: int = BATCH_TOKENS,
    invariant: bool = False,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Score rows: with labels the likeliest label wins, without them the greedy completion must be exact.

    Both count with the end that training puts behind them: "1" does not win where the model says "10". A completion
    that the vocabulary cannot write is never exact: its tokens may be, and the text they write is another.

    Several processes each score a share of the rows, and all get the whole.

    Returns per row {"id", "correct": 0 or 1, "logprob": of the right completion, "answer": label or None}; without
    labels also "tokens" (with the end) and "bytes" (of the text, without one) of the completion.
    """
    settings: dict[str, Any] = {"batch_tokens": batch_tokens, "invariant": invariant, "progress": progress}
    scorer = Scorer(model, tokenizer, soft_prompt=soft_prompt, **settings)
    asked = labels or ("",)
    requests = [(r.prompt, y or r.completion) for r in rows for y in asked]
    wheres, ends = [r.where for r in rows for _ in asked], [r.ends for r in rows for _ in asked]
    splits = scorer.encoder.join(requests, end=ends, wheres=wheres)
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
            text = scorer.encoder.without_end(row.completion)
            size = {"tokens": mine[0].num_tokens, "bytes": len(text.encode("utf-8"))}
            item = {"correct": int(exact), "logprob": mine[0].logprob, "answer": None, **size}
        out.append({"id": row.where or str(n), **item})
    return out


def written(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    max_new_tokens: int | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    invariant: bool = False,
    progress: Callable[[float], None] | None = None,
) -> list[Part]:
    """The greedy answer to each row's prompt, in batches: {"answer": the text, "cut": tokens at which it was cut}.

    cut is 0 where the answer came to its end. max_new_tokens: of an answer; None: 1.5 times the longest reference of
    `rows`, from 16 to 512, and never less than that reference has. No answer goes beyond the positions of the model.
    """
    encoder = Scorer(model, tokenizer).encoder
    splits = encoder.join([(r.prompt, r.completion) for r in rows], end=True, wheres=[r.where for r in rows])
    longest = max((len(s.answer) for s in splits), default=0)
    most, reach = max_new_tokens or _room(longest), trial.reach(model)
    probes = [
        Probe("task", str(n), "generate", row.prompt, max_tokens=max(1, min(most, reach - split.start - 1)))
        for n, (row, split) in enumerate(zip(rows, splits, strict=True))
    ]
    said = spoken(model, tokenizer, probes, batch_size=batch_for(batch_tokens, invariant), progress=progress)
    sides = zip(said, probes, strict=True)
    return [{"answer": one.text, "cut": 0 if one.ended else probe.max_tokens} for one, probe in sides]


def _room(longest: int) -> int:
    """Tokens of an answer where the longest reference has so many."""
    return max(longest, min(LONGEST, max(SHORTEST, 3 * longest // 2)))


def cut_words(before: Items | None, after: Items) -> str:
    """How many of the written answers were cut before their end, and where; "" for none.

    Such an answer is judged as it stands, and one more sentence might have made it right, or wrong.
    """
    cuts = [[i["cut"] for i in side if i.get("cut")] for side in (after, before or ())]
    if not any(cuts):
        return ""
    base = f" (base: {len(cuts[1])})" if before else ""
    low, high = min(map(min, filter(None, cuts))), max(map(max, filter(None, cuts)))
    at = f"{high}" if low == high else f"{low} to {high}"
    where = " (measure.max_new_tokens)" if low == high else ""  # else the model reads no more
    how = f"were cut at {at} tokens and judged so{where}"
    return f"{len(cuts[0])} of {len(after)} answers{base} {how}"


def plainly(rows: Sequence[Row], encoder: Encoder) -> list[Row]:
    """The rows with completions as a reader knows them, without the end that a chat template writes behind them."""
    return [replace(row, completion=encoder.without_end(row.completion)) for row in rows]


def judged(rows: Sequence[Row], said: Sequence[Part], judge: Callable[[str, Row], float], top: float) -> list[Part]:
    """Per row {"id", "correct": share of `top` that the judge gives the text, and what `written` says of it}.

    rows: as `plainly` gives them.
    """
    return [
        {"id": row.where or str(n), "correct": judge(one["answer"], row) / top, **one}
        for n, (row, one) in enumerate(zip(rows, said, strict=True))
    ]


def task_estimates(metric: Metric, before: Items | None, after: Items) -> Part:
    """before, after and difference in the metric's own unit, and the same of the metrics that come for nothing."""
    others = [
        {"metric": m.words, "unit": m.unit, "lower": m.lower, **only(m, before, after)}
        for m in (METRICS[name] for name in BESIDE.get(metric.name, ()))
    ]
    return {**only(metric, before, after), "others": others}


def only(metric: Metric, before: Items | None, after: Items) -> Part:
    """before, after and difference in the metric's own unit."""
    if metric.top is None:
        return _losses("bytes" if metric.name == "loss_per_byte" else "tokens", before, after)
    part = estimates(before, after)
    return {side: _times(metric.top, estimate) for side, estimate in part.items()}


def _times(top: float, estimate: Part | None) -> Part | None:
    if estimate is None:
        return None
    return {k: v if k == "n" or v is None else top * v for k, v in estimate.items()}


def _losses(unit: str, before: Items | None, after: Items) -> Part:
    """Loss by token or byte over all rows: the sum of the losses over the sum of the sizes."""
    size = [i[unit] for i in after]
    second = [-i["logprob"] for i in after]
    part: Part = {"before": None, "after": stats.pooled(second, size).to_dict(), "difference": None}
    if before is not None:
        first = [-i["logprob"] for i in before]
        part["before"] = stats.pooled(first, size).to_dict()
        moved = [b - a for a, b in zip(first, second, strict=True)]
        part["difference"] = stats.pooled(moved, size).to_dict()
    return part
