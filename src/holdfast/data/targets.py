"""Which tokens of a row are targets, and their weights: of a completion all, of a conversation those of its turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from holdfast.data.encoder import Encoder, Split
from holdfast.data.rendered import Rendered, Turn
from holdfast.data.rows import Row
from holdfast.engine.pack import WEIGHT, TokenRow, token_row


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
        made = [token_row(one.ids, one.start, owner, source) for one in splits]
        return [weighed(one, np.full(len(one.ids), turn.weight)) for one, turn in zip(made, row.turns, strict=True)]
    scored, weights = np.zeros(len(split.ids), dtype=bool), np.ones(len(split.ids))
    for n, (start, end) in enumerate(spans):
        scored[max(1, start) : end] = True
        weights[start:end] = row.turns[min(n, len(row.turns) - 1)].weight  # an end that was added is the last turn's
    return [weighed(TokenRow(np.asarray(split.ids, dtype=np.int64), scored, owner, source), weights)]


def weighed(row: TokenRow, weights: np.ndarray) -> TokenRow:
    """The row with a weight for each of its (T,) tokens; as it is where all targets weigh 1."""
    if (weights[row.scored] == 1).all():
        return row
    return replace(row, numbers={**row.numbers, WEIGHT: weights.astype(np.float32)})


def _spans(text: str, turns: Sequence[Turn], ids: Sequence[int], encoder: Encoder) -> list[tuple[int, int]] | None:
    """The turns as [start, end) in tokens, each up to the token that ends it; None where they do not nest."""
    (whole,) = encoder.bare([text])
    begins = [text[:at] for turn in turns for at in (turn.start, turn.end)]
    heads = encoder.heads(begins, [whole] * len(begins))
    if any(list(ids[: len(head)]) != head[: len(ids)] for head in heads):
        return None
    at = [min(len(head), len(ids)) for head in heads]
    spans = [(start, encoder.end_of(ids, start, end)) for start, end in zip(at[::2], at[1::2], strict=True)]
    last = spans[-1]
    if turns[-1].end == len(text):
        return [*spans[:-1], (last[0], len(ids))]
    return spans + [(len(whole), len(ids))] * (len(ids) > len(whole))  # an end that the row was given
