"""From text rows to token rows: one rule for where the answer starts and when it ends."""

from __future__ import annotations

from typing import Any

from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import DataError
from holdfast.rows import Row


def tokenize(
    row: Row,
    tokenizer: Any,
    max_length: int | None,
    *,
    owner: str = "task",
    source: str | None = None,
    all_tokens: bool = False,
) -> TokenRow:
    """Tokenise prompt + completion together and end with the end-of-text token.

    Targets are the tokens after the prompt's (as lm-evaluation-harness splits them), all tokens for plain text or when
    `all_tokens`. Rendered chat rows carry their own special tokens.

    Raises:
        DataError: the row is longer than max_length (nothing is cut silently).
    """
    text = row.prompt + row.completion
    eos, bos = tokenizer.eos_token or "", tokenizer.bos_token or ""
    rendered = bool(bos and text.startswith(bos)) or bool(eos and text.rstrip().endswith(eos))
    ids = tokenizer.encode(text, add_special_tokens=not rendered)
    if not rendered and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    if max_length and len(ids) > max_length:
        raise DataError(
            f"{row.where or 'A row'} has {len(ids)} tokens, more than max_length {max_length}.",
            "Raise data.max_length (up to the model's own limit), or shorten or drop the row.",
        )
    start = 1 if all_tokens or not row.prompt else len(tokenizer.encode(row.prompt, add_special_tokens=not rendered))
    return token_row(ids, start, owner, source or row.source)
