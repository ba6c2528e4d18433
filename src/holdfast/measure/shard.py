"""One measurement made by several processes (torchrun, accelerate launch): each answers a share, all get the whole.

Scored probes are dealt out by whole clusters, so that a shared prefix is still computed once; generated text by whole
batches, because greedy text depends on the last bits of a batch. Every process must ask for the same measurement, as
with any collective call. Where the weights themselves are split (FSDP, ZeRO-3, tensor parallelism) a forward needs
all processes at once, so there nothing is dealt out and each does everything.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from holdfast.engine.processes import gather, shares, world
from holdfast.measure.scorer import Score, Scorer


def score_tokens(scorer: Scorer, encoded: Sequence[tuple[list[int], int]], keys: Sequence[Hashable]) -> list[Score]:
    """As `scorer.score_tokens`, dealt out by `keys`."""
    rank, num = world(scorer.model)
    if num == 1:
        return scorer.score_tokens(encoded)
    mine = shares(keys, [len(ids) for ids, _ in encoded], num)[rank]
    got = scorer.score_tokens([encoded[n] for n in mine])
    parts = gather([[n, s.logprob, s.greedy] for n, s in zip(mine, got, strict=True)])
    found = {n: (logprob, greedy) for part in parts for n, logprob, greedy in part}
    scorer.num_unique_tokens = scorer.count(encoded)  # prefixes of two shares are in both
    return [Score(*found[n], len(ids) - start) for n, (ids, start) in enumerate(encoded)]
