"""Few-shot prompts as token rows, shared by everything that trains on them."""

from dataclasses import replace
from typing import Any

import numpy as np

from holdfast.engine.pack import TokenRow, token_row
from holdfast.fewshot import Prompt


def encode_shots(
    prompt: Prompt,
    tokenizer: Any,
    owner: str,
    *,
    every_token: bool,
    source: str | None = None,
) -> TokenRow:
    """Tokenise a finished few-shot prompt; targets are all tokens, or the answers of all shots and the query."""
    text = prompt.context + prompt.answer + prompt.stop
    got = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not _has_bos(text, tokenizer))
    ids = np.asarray(got["input_ids"], dtype=np.int64)
    inside = np.zeros(len(text) + 1, dtype=bool)
    for start, end in prompt.spans:
        inside[start:end] = True
    inside[len(prompt.context + prompt.answer) : len(text)] = True  # the end of the answer is part of it
    answers = np.array([bool(inside[a:b].any()) for a, b in got["offset_mapping"]])
    answers[0] = False
    if every_token:
        return replace(token_row(ids, 1, owner, source or owner), gold=answers)
    return TokenRow(ids, answers, owner, source or owner, gold=answers)


def _has_bos(text: str, tokenizer: Any) -> bool:
    return bool(tokenizer.bos_token and text.startswith(tokenizer.bos_token))
