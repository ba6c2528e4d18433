"""How close one model stays to another's answers: the share of its answer's tokens that would be chosen too.

The tuned model answers prompts greedily. A second model reads each prompt with that answer, and every position where
its own likeliest token is the answer's counts. The tuned model itself scores 1, up to ties within rounding.

Prompts come from the user, or the tuned model draws them: texts that it writes when it has read nothing. A model that
was tuned on answers alone has not learnt to write its task's prompts, so these may lie far from the task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.data.encoder import Encoder, encoder_of
from holdfast.data.metric import Metric
from holdfast.engine.base import batches
from holdfast.engine.forward import forward
from holdfast.engine.pack import token_row
from holdfast.errors import DataError, ModelError
from holdfast.measure.answers import Sampling, respond, room_of, seed_of

CLOSENESS = Metric("closeness", "tokens of the tuned model's answers kept", "answer")
DRAWN, PROMPT_TOKENS, ANSWER_TOKENS, SHORTEST = 128, 48, 32, 4  # ours
FEWEST = 8  # prompts without which nothing is said
Tokens = list[int]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one a line, or in .jsonl a text or an object with `prompt` a line.

    Raises:
        DataError: the file cannot be read, a line is no prompt, or there are too few.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Name a text file with a prompt a line.") from error
    found = lines if path.suffix != ".jsonl" else [_prompt(path, n, line) for n, line in enumerate(lines, start=1)]
    found = list(dict.fromkeys(found))
    if len(found) < FEWEST:
        raise DataError(f"{path} holds {len(found)} different prompts.", f"Give {FEWEST} or more.")
    return found


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        what = f'{path}:{number} is neither a text nor an object with a text "prompt".'
        raise DataError(what, 'Write {"prompt": "..."}.')
    return text


def encoded(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """Prompts as tokens; of one that leaves no room for an answer the beginning is dropped."""
    room = room_of(model) - ANSWER_TOKENS
    return [ids[-room:] for ids in Encoder(tokenizer).prompts(texts)]


def drawn_prompts(model: Any, tokenizer: Any, seed: int = 0) -> list[Tokens]:
    """Texts that the model writes when it has read nothing, at temperature 1, each once.

    Raises:
        ModelError: too few of them differ.
    """
    encoder = encoder_of(model, tokenizer)
    first = encoder.first
    seeds = [seed_of(seed, first, n) for n in range(DRAWN)]
    asked = [(first, PROMPT_TOKENS)] * DRAWN
    texts = respond(model, tokenizer, asked, seeds, Sampling(PROMPT_TOKENS, temperature=1.0))
    bare = [[i for i in ids if i not in encoder.stops] for ids in texts]
    found = dict.fromkeys((*first, *ids) for ids in bare if len(ids) >= SHORTEST)
    if len(found) < FEWEST:
        what = f"The tuned model writes only {len(found)} different texts of {SHORTEST} tokens or more by itself."
        raise ModelError(what, "Give prompts with --prompts, or task rows with --data.")
    return [list(ids) for ids in found]


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[Tokens]) -> list[Tokens]:
    """The model's likeliest answer to each prompt, with the token that ends it."""
    asked = [(ids, ANSWER_TOKENS) for ids in prompts]
    return respond(model, tokenizer, asked, [0] * len(asked), Sampling(ANSWER_TOKENS))


@torch.no_grad()
def closeness(
    model: Any,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_tokens: int,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Per (prompt, answer) {"id", "correct": share of the answer's tokens that are the model's likeliest too,
    "logprob": of the answer in nats}."""
    rows = [token_row([*prompt, *answer], len(prompt)) for prompt, answer in pairs]
    found: list[tuple[float, float]] = []
    for done, batch in batches(rows, batch_tokens):
        packed, logits = forward(model, batch)
        same = (logits.argmax(-1) == packed.target).float()
        logp = logits.float().log_softmax(-1).gather(1, packed.target[:, None])[:, 0]
        sizes = np.bincount(packed.row, minlength=len(batch)).tolist()
        parts = zip(same.split(sizes), logp.split(sizes), strict=True)
        found += [(float(s.mean()), float(lp.sum())) for s, lp in parts]
        if progress:
            progress(done / len(rows))
    return [{"id": str(n), "correct": c, "logprob": lp} for n, (c, lp) in enumerate(found)]
