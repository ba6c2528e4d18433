"""Asking a model the probes of a suite: requests in, a score between 0 and 1 for every probe out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.data.encoder import Encoder, Split
from holdfast.engine import BATCH_TOKENS
from holdfast.errors import HoldfastError
from holdfast.measure import shard
from holdfast.measure.generate import batch_for, generate
from holdfast.measure.probe import Probe, Suite, counts_end
from holdfast.measure.scorer import Score, Scorer

ENDS = ("\n", "\n\n")  # what ends an answer beside the end-of-text token: some vocabularies have both as one token


def score_suite(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    batch_tokens: int = BATCH_TOKENS,
    invariant: bool = False,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Score every probe; returns plain data: {"suite", "tasks": [{"name", ..., "items": [...]}], ...}.

    Every item has "id", "cluster" and "correct" (its score in [0, 1]); further keys by kind. Under several processes
    each answers a share of the probes and all return the whole (`measure.shard`). invariant: no item depends on
    `batch_tokens` or on other items, to the last bit, and the result says so.

    Raises:
        HoldfastError: a probe is longer than the model reads.
    """
    tell = progress or (lambda _: None)
    spoken = [p for p in suite.probes if p.kind == "generate"]
    scored = [p for p in suite.probes if p.kind != "generate"]
    share = len(scored) / max(1, len(scored) + 8 * len(spoken))  # an answer costs some eight times a likelihood
    settings: dict[str, Any] = {"batch_tokens": batch_tokens, "invariant": invariant}
    scorer = Scorer(model, tokenizer, progress=lambda x: tell(x * share), **settings)
    ways = ways_of(scored, scorer.encoder)
    encoded = scorer.fit([split for _, of_answer in ways for split in of_answer])
    _check_lengths(suite, encoded, scorer.max_length)
    shared = [(p.task, p.cluster or p.id) for p, of_answer in ways for _ in of_answer]
    scores = iter(shard.score_tokens(scorer, encoded, shared))
    by_answer = iter([any_of([next(scores) for _ in of_answer]) for _, of_answer in ways])
    results = {p.id: _RESULTS[p.kind](p, [next(by_answer) for _ in p.answers]) for p in scored}
    batch = batch_for(**settings)
    outputs = generate(model, tokenizer, spoken, batch_size=batch, progress=lambda x: tell(share + x * (1 - share)))
    for p, output in zip(spoken, outputs, strict=True):
        assert p.judge is not None, "a generate probe has a judge"
        further = {"marks": p.marks(output)} if p.marks else {}
        results[p.id] = {"correct": p.judge(output), "output": output, **further}
    items: dict[str, list[dict[str, Any]]] = {g.name: [] for g in suite.groups}
    for p in suite.probes:
        extra = {} if p.shots is None else {"shots": p.shots}
        items[p.task].append({"id": p.id, "cluster": p.cluster, **results[p.id], **extra})
    return {
        "suite": suite.name,
        **suite.settings,
        **({"note": suite.note} if suite.note else {}),
        **({"invariant": True} if invariant else {}),
        "num_unique_tokens": scorer.num_unique_tokens,
        "tasks": [
            {
                "name": g.name,
                "version": g.version,
                "chance": g.chance,
                "metric": g.metric,
                "clustered": g.clustered,
                "items": items[g.name],
            }
            for g in suite.groups
        ],
    }


def ways_of(probes: Sequence[Probe], encoder: Encoder) -> list[tuple[Probe, list[Split]]]:
    """For every answer of every probe, in order: the token sequences whose probabilities add up to the answer's."""
    asked = [(p, a) for p in probes for a in p.answers]
    plain = encoder.join([(p.context, a) for p, a in asked], end=False, wheres=[p.id for p, _ in asked])
    out = [(p, [split]) for (p, _), split in zip(asked, plain, strict=True)]
    bare = [n for n, (p, a) in enumerate(asked) if counts_end(p) and not encoder.is_ended(a, plain[n])]
    pairs, ids = [(asked[n][0].context, asked[n][1]) for n in bare], [asked[n][0].id for n in bare]
    ended = [encoder.join(pairs, end=True, wheres=ids)] if encoder.end is not None else []
    lines = [encoder.join([(c, a + end) for c, a in pairs], end=False, wheres=ids) for end in ENDS]
    for at, n in enumerate(bare):
        found: list[Split] = []
        for split in (column[at] for column in (*ended, *lines)):
            if not any(split.ids[: len(f.ids)] == f.ids for f in found):  # else it is one of the texts that f begins
                found.append(split)
        out[n] = (asked[n][0], found)
    return out


def any_of(scores: Sequence[Score]) -> Score:
    """The score of a text that may be written in several ways, none the beginning of another."""
    if len(scores) == 1:
        return scores[0]
    top = max(s.logprob for s in scores)
    total = top + math.log(sum(math.exp(s.logprob - top) for s in scores))
    return Score(total, any(s.greedy for s in scores), scores[0].num_tokens)


def _check_lengths(suite: Suite, encoded: Sequence[tuple[list[int], int]], longest: int) -> None:
    most = max((len(ids) for ids, _ in encoded), default=0)
    if most >= longest:  # lm_eval would silently drop tokens from the left
        raise HoldfastError(
            f"The suite {suite.name!r} needs {most} tokens, the model reads {longest}.",
            "Ask for fewer shots (num_fewshot), or use a model that reads more.",
        )


def _exact(_: Probe, scores: Sequence[Score]) -> dict[str, Any]:
    return {"correct": int(scores[0].greedy), "logprob": scores[0].logprob}


def _choice(p: Probe, scores: Sequence[Score]) -> dict[str, Any]:
    lengths = p.answer_lengths or (1,) * len(scores)
    per_unit = [s.logprob / n for s, n in zip(scores, lengths, strict=True)]
    top = max(per_unit)
    weights = [math.exp(x - top) for x in per_unit]
    prob = [w / sum(weights) for w in weights]
    best = per_unit.index(top)
    return {
        "correct": int(best == p.right and per_unit.count(top) == 1),  # a model that tells none apart is not right
        "logprob": scores[p.right].logprob,
        "picked": best,
        "prob": prob[p.right],
        "confidence": prob[best],
        "brier": sum((q - (n == p.right)) ** 2 for n, q in enumerate(prob)),
    }


def _calibrated(p: Probe, scores: Sequence[Score]) -> dict[str, Any]:
    out = _choice(p, scores)
    return {**out, "hit": out["correct"], "correct": 1 - out["brier"] / 2}


def _likelihood(p: Probe, scores: Sequence[Score]) -> dict[str, Any]:
    s = scores[0]
    loss = -s.logprob / s.num_tokens
    return {
        "correct": math.exp(-loss),
        "logprob": s.logprob,
        "num_tokens": s.num_tokens,
        "num_bytes": len(p.answers[0].encode()),
    }


_RESULTS: dict[str, Callable[[Probe, Sequence[Score]], dict[str, Any]]] = {
    "exact": _exact,
    "begins": _exact,
    "choice": _choice,
    "calibrated": _calibrated,
    "likelihood": _likelihood,
}
