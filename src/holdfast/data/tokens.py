"""Rows of text into rows of tokens, as `encoder` cuts them, with what is a target of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from holdfast.data.encoder import Encoder, Split
from holdfast.data.lengths import Limit
from holdfast.data.notes import Notes
from holdfast.data.rows import Row
from holdfast.data.targets import conversation
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import DataError

MENDED = "{n prompt} ending inside a token of the answer; each was cut there, as inference sees it"
UNWRITTEN = "{n completion} that the tokenizer cannot write as it stands"
APART = "{n conversation} of which tokens span two messages; each answer was made a row of its own"
STOPPED = "{n completion} with a token in the middle that ends generation"


def tokenize(row: Row, tokenizer: Any, max_length: int | None, **settings: Any) -> TokenRow:
    """`tokenize_all` of one row, with its settings."""
    return tokenize_all([row], tokenizer, max_length, **settings)[0]


def tokenize_all(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int | None,
    *,
    owner: str = "task",
    source: str | None = None,
    all_tokens: bool = False,
    stops: Iterable[int] = (),
    notes: list[str] | None = None,
) -> list[TokenRow]:
    """Tokenise prompt + completion of each row and end it. Targets are the tokens after the prompt's, those of a
    conversation's turns, all tokens for plain text or when `all_tokens`.

    Args:
        max_length: a longer row is refused.
        stops: further tokens that end a generation (`stops_of`).
        notes: gets a sentence for everything that was not plain: how many rows, and which is the first.

    Raises:
        DataError: a row is longer than max_length (nothing is cut silently), or its answer cannot be told from its
            prompt.
    """
    encoder, odd = Encoder(tokenizer, stops), Notes()
    kind = {"owner": owner, "source": source, "all_tokens": all_tokens}
    out = [t for made in tokenize_each(rows, encoder, Limit(max_length), odd, **kind) for t in made]
    if notes is not None:
        notes += odd.lines()
    return out


def tokenize_each(
    rows: Sequence[Row],
    encoder: Encoder,
    limit: Limit,
    notes: Notes,
    *,
    owner: str = "task",
    source: str | None = None,
    all_tokens: bool = False,
    documents: bool = False,
) -> list[list[TokenRow]]:
    """`tokenize_all`, with what becomes of each row: none, one or several token rows.

    documents: plain text stands behind a token (`Encoder.first`) where the tokenizer puts none before texts, as where
    it is scored; so its first token is a target too.
    """
    splits = encoder.join([(r.prompt, r.completion) for r in rows], end=True, wheres=[r.where for r in rows])
    out, written = [], encoder.written([row.completion for row in rows], splits)
    for row, split, (says, writes) in zip(rows, splits, written, strict=True):
        if row.turns and not all_tokens:
            made = conversation(row, split, encoder, owner, source or row.source)
        else:
            start = 1 if all_tokens or not row.prompt else split.start
            front = encoder.first if documents and not row.prompt and not split.start else []
            made = [token_row([*front, *split.ids], start, owner, source or row.source)]
        if len(made) > 1:
            notes.add(APART, row.where)
        begin = encoder.begin
        lead = len(begin) if begin and split.ids[: len(begin)] == begin else 0
        out.append([cut for one in made for cut in limit.fit(one, row.where, notes, lead, text=not row.prompt)])
        if not says:
            what = f"{row.where or 'A row'}: the completion {row.completion!r} says nothing before its end."
            raise DataError(what, "Remove the row or fill it in: the model would learn to stop at once.")
        _note(notes, encoder, row, split, writes)
    return out


def _note(notes: Notes, encoder: Encoder, row: Row, split: Split, writes: bool) -> None:
    """Count what is not plain about a row as tokens."""
    example = f"{row.prompt[-20:]!r} + {row.completion[:40]!r}"
    if split.mended:
        notes.add(MENDED, row.where, example)
    if not writes:
        notes.add(UNWRITTEN, row.where, example)
    if row.prompt and encoder.stops & set(split.answer[:-1]):
        notes.add(STOPPED, row.where, example)
