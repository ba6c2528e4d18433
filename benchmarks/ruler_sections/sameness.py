"""What must not change a score: nothing at all (a model against itself), or another way of scoring."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np

from ruler_sections.lab import KEEP, Data, Lab, items_of, measured, suite_of


def zero(lab: Lab) -> Data:
    """The base against itself: loaded and scored twice."""
    from holdfast.measure.compare import abilities
    from holdfast.measure.suites import DEFAULT

    runs = []
    for _ in range(2):
        model, tokenizer = lab.load()
        runs.append([measured(model, tokenizer, n, lab.size(None, 2), lab.size(8, 1)) for n in DEFAULT])
        del model
        gc.collect()
    parts = abilities(*runs, {}, KEEP)
    return {"suites": [_same(a, b, p) for a, b, p in zip(*runs, parts, strict=True)]}


def _same(first: Data, second: Data, part: Data) -> Data:
    pairs = list(zip(items_of(first), items_of(second), strict=True))
    gaps = [abs(a[k] - b[k]) for a, b in pairs for k in ("correct", "logprob") if k in a]
    changed = sum(a != b for a, b in pairs)
    known = {"suite": first["suite"], "items": len(pairs), "changed": changed, "largest": max(gaps)}
    return {**known, "status": part["status"]}


def invariance(lab: Lab) -> Data:
    """One set of requests, scored in ways that must not matter."""
    return {dtype: _ways(lab, dtype) for dtype in ("float32", "bfloat16")}


def _ways(lab: Lab, dtype: str) -> Data:
    from holdfast.measure.scorer import Scorer

    model, tokenizer = lab.load(dtype)
    asked = suite_of("in-context", tokenizer, lab.size(6, 1), lab.size(8, 1)).probes
    asked += suite_of("knowledge", tokenizer, lab.size(24, 2)).probes
    scorer = Scorer(model, tokenizer)
    encoded = [scorer.encode((p.context, a)) for p in asked for a in p.answers]
    order = np.random.default_rng(0).permutation(len(encoded))
    mixed = dict(zip(order, scorer.score_tokens([encoded[n] for n in order]), strict=True))
    padded = Scorer(model, tokenizer)
    padded._walk_tree = padded._walk_padded  # the way of models whose attention takes no tree
    ways = {
        "again": scorer.score_tokens(encoded),
        "batch_tokens 128": Scorer(model, tokenizer, batch_tokens=128).score_tokens(encoded),
        "batch_tokens 512": Scorer(model, tokenizer, batch_tokens=512).score_tokens(encoded),
        "items shuffled": [mixed[n] for n in range(len(encoded))],
        "no shared prefixes, one by one": [_alone(model, *e) for e in encoded],
        "no shared prefixes, right-padded batches": padded.score_tokens(encoded),
    }
    usual = scorer.score_tokens(encoded)
    return {"requests": len(encoded), "ways": {name: _apart(asked, usual, s) for name, s in ways.items()}}


def _alone(model: Any, ids: list[int], start: int) -> Any:
    """One request in one plain forward: no tree, no cache, no mask, no padding."""
    import torch

    from holdfast.measure.scorer import Score

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids[:-1]], device=model.device), use_cache=False).logits
    logp = logits[0, start - 1 :].float().log_softmax(-1)
    target = torch.tensor(ids[start:], device=logp.device)
    picked = logp.gather(1, target[:, None]).double().sum()
    return Score(float(picked), bool((logp.argmax(-1) == target).all()), len(target))


def _apart(probes: Sequence[Any], usual: Sequence[Any], other: Sequence[Any]) -> Data:
    a, b = decisions(probes, usual), decisions(probes, other)
    gaps = [abs(x.logprob - y.logprob) for x, y in zip(usual, other, strict=True)]
    return {"decisions": len(a), "differ": sum(x != y for x, y in zip(a, b, strict=True)), "largest": max(gaps)}


def decisions(probes: Sequence[Any], scores: Sequence[Any]) -> list[int]:
    """What each probe's score hangs on: the greedy flag, or the likeliest answer."""
    rest, out = iter(scores), []
    for p in probes:
        mine = [next(rest) for _ in p.answers]
        out.append(int(mine[0].greedy) if p.kind == "exact" else int(np.argmax([s.logprob for s in mine])))
    return out
