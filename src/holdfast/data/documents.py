"""Documents that are measured: parts that a model can read, cut between two tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from holdfast.data.encoder import Encoder
from holdfast.data.rows import Row

ROOM = 8  # tokens left free: what is put before and behind a text, and a cut that changes its neighbours


def text_parts(row: Row, encoder: Encoder, longest: int) -> Iterator[Row]:
    """A plain text as rows of at most `longest` tokens, which together are the text; a short one as it is.

    Each is scored by itself, without what stands before it. A tokenizer written in Python tells no places: its text is
    cut by characters, of which a token has at least one.
    """
    text, most = row.completion, max(1, longest - ROOM)
    ids, places = encoder.marked(text)
    if len(ids) <= most:
        yield row
        return
    if encoder.tokenizer.is_fast:
        starts = [start for start, end in places if end > start]
        cuts = [0, *sorted(set(starts[most::most]) - {0}), len(text)]
    else:
        cuts = [*range(0, len(text), most), len(text)]
    parts = [text[a:b] for a, b in pairwise(cuts)]
    for n, part in enumerate(parts, 1):
        if part.strip():
            yield replace(row, completion=part, where=f"{row.where} (part {n})", ends=n == len(parts))
