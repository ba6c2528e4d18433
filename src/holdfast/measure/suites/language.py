"""The language suite: how likely a model finds ordinary prose, code, dialogue, German and French.

The score of a passage is exp(-loss), where loss is the mean negative log-likelihood of its tokens in nats, read from
the bos token alone: the geometric mean of the probabilities the model gave to the tokens that came. The ratio of two
models that share a tokenizer is exp(loss_base - loss_tuned), the share of the likelihood per token that was kept: 0.9
means that every token became, on the geometric mean, a tenth less likely. Between tokenizers only bits per byte can be
compared; `summary` has them, and the perplexity.

The passages were written for this project and are short, so the first tokens, which have little context, weigh more
than in the corpora usually used for perplexity; the figures are for base against tuned, not against published ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.in_context import shuffled

LIMIT = 6  # passages of each task
FILE = Path(__file__).parent / "data" / "language.json"


@dataclass(frozen=True)
class Passage:
    """A text of 60 to 110 words or 8 to 20 lines; `theme` is its subject, or its language if it is code."""

    theme: str
    text: str


@lru_cache
def read_data() -> tuple[int, dict[str, tuple[Passage, ...]]]:
    """The version of the data and the passages of each task, in the order of the file."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return data["version"], {t["name"]: tuple(Passage(**p) for p in t["passages"]) for t in data["tasks"]}


def build_suite(ask: Ask) -> Suite:
    """One probe a passage; of each task the first `limit` of a fixed shuffle."""
    limit = ask.limit or LIMIT
    version, tasks = read_data()
    probes = [
        Probe(task, f"{task}/{n}", "likelihood", "", (passage.text,))
        for task, passages in tasks.items()
        for n, passage in shuffled(f"{task}/{ask.seed}", list(enumerate(passages)))[:limit]
    ]
    groups = tuple(Group(task, version, 0.0, "token probability (geometric mean)") for task in tasks)
    return Suite("language", groups, tuple(probes), {"limit": limit, "seed": ask.seed})


def summary(items: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The usual figures of scored passages, every token (byte) weighing the same.

    Args:
        items: of one task or more, each with "logprob" (nats), "num_tokens" and "num_bytes"; at least one.

    Returns:
        "nats_per_token", "bits_per_byte" (bytes of UTF-8) and "perplexity" = exp(nats_per_token).
    """
    rows = [(-i["logprob"], i["num_tokens"], i["num_bytes"]) for i in items]
    nats, tokens, size = (sum(column) for column in zip(*rows, strict=True))
    loss = nats / tokens
    return {"nats_per_token": loss, "bits_per_byte": nats / math.log(2) / size, "perplexity": math.exp(loss)}
