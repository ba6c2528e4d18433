"""Few-shot prompts as token rows, shared by everything that trains on them."""

from dataclasses import replace
from typing import Any

import numpy as np

from holdfast.data.encoder import Encoder
from holdfast.data.fewshot import Prompt
from holdfast.engine.pack import TokenRow, token_row


def encode_shots(
    prompt: Prompt,
    tokenizer: Any,
    owner: str,
    *,
    every_token: bool,
    source: str | None = None,
) -> TokenRow:
    """Tokenise a finished few-shot prompt; targets are all tokens, or the answers of all shots and the query."""
    encoder, context = Encoder(tokenizer), prompt.context
    head, places = encoder.marked(context, [n for span in prompt.spans for n in span if n <= len(context)])
    (split,) = encoder.join([(context, prompt.answer + prompt.stop)], end=False)
    inside = np.zeros(len(context) + 1, dtype=bool)
    for start, end in prompt.spans:
        inside[start:end] = True
    # the last answer and its end follow the context
    answers = np.array([bool(inside[a:b].any()) for a, b in places] + [True] * (len(split.ids) - len(head)))
    answers[0] = False
    ids = np.asarray(split.ids, dtype=np.int64)
    if every_token:
        return replace(token_row(ids, 1, owner, source or owner), gold=answers)
    return TokenRow(ids, answers, owner, source or owner, gold=answers)
