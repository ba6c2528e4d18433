"""Which tokens of a row are targets: of a completion all, of a conversation those of its turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from holdfast.data.encoder import Encoder, Split
from holdfast.data.rendered import Rendered, Turn
from holdfast.data.rows import Row
from holdfast.engine.pack import TokenRow, token_row


def conversation(row: Row, split: Split, encoder: Encoder, owner: str, source: str) -> list[TokenRow]:
    """The token rows of a conversation: one, if each prefix of its text is a prefix of its tokens.

    Every answer is trained behind the tokens that inference shows before it. Where a token spans the end of one
    message and the beginning of the next that cannot be so in one row, and each answer gets a row of its own.
    """
    text = row.prompt + row.completion
    spans = _spans(text, row.turns, split.ids, encoder)
    if spans is None:
        pairs = [(Rendered(text[: turn.start]), text[turn.start : turn.end]) for turn in row.turns]
        splits = encoder.join(pairs, end=True, wheres=[row.where] * len(pairs))
        return [token_row(one.ids, one.start, owner, source) for one in splits]
    scored = np.zeros(len(split.ids), dtype=bool)
    for start, end in spans:
        scored[max(1, start) : end] = True
    return [TokenRow(np.asarray(split.ids, dtype=np.int64), scored, owner, source)]


def _spans(text: str, turns: Sequence[Turn], ids: Sequence[int], encoder: Encoder) -> list[tuple[int, int]] | None:
    """The turns as [start, end) in tokens, each up to the token that ends it; None where they do not nest."""
    (whole,) = encoder.bare([text])
    begins = [text[:at] for turn in turns for at in turn]
    heads = encoder.heads(begins, [whole] * len(begins))
    if any(list(ids[: len(head)]) != head[: len(ids)] for head in heads):
        return None
    at = [min(len(head), len(ids)) for head in heads]
    spans = [(start, encoder.end_of(ids, start, end)) for start, end in zip(at[::2], at[1::2], strict=True)]
    last = spans[-1]
    if turns[-1].end == len(text):
        return [*spans[:-1], (last[0], len(ids))]
    return spans + [(len(whole), len(ids))] * (len(ids) > len(whole))  # an end that the row was given
