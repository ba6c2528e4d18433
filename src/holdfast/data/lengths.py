"""Rows that are longer than data.max_length: refused, dropped, truncated or split, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from holdfast.data.notes import Notes
from holdfast.engine.pack import TokenRow
from holdfast.errors import DataError

DROPPED = "{n row} longer than data.max_length, left out"
CUT_HEAD = "{n row} longer than data.max_length, cut at the beginning; the last answer is whole"
CUT_ALL = "{n row} longer than data.max_length, cut at the beginning"
CUT_TAIL = "{n row} longer than data.max_length, cut so that the end of the answer is lost"
CUT_UP = "{n row} longer than data.max_length, split"
MOST_DROPPED = 0.5  # of the rows; more is a wrong max_length (ours)


@dataclass(frozen=True)
class Limit:
    """How long a row may be (None: as long as it likes), and what becomes of a longer one.

    how: refuse, drop, truncate or split; None: split for plain text, drop for other rows. stride: tokens that the
    parts of a split row have in common. of_model: it is the model that reads no more, whatever data.max_length says.
    """

    most: int | None = None
    how: str | None = "refuse"
    stride: int = 0
    of_model: bool = False

    def fit(self, row: TokenRow, where: str, notes: Notes, lead: int = 0, text: bool = False) -> list[TokenRow]:
        """What becomes of one row. lead: its first tokens that stand before every text; text: it is plain text.

        Raises:
            DataError: the row is too long and that is refused.
        """
        if not self.most or len(row.ids) <= self.most:
            return [row]
        how = self.how or ("split" if text else "drop")
        if how == "drop":
            notes.add(DROPPED, where)
            return []
        if how == "truncate":
            cut, said = truncated(row, self.most, lead, text)
            notes.add(said, where)
            return [cut]
        if how == "split":
            notes.add(CUT_UP, where)
            return list(parts(row, self.most, self.stride))
        what = f"{where or 'A row'} has {len(row.ids)} tokens, more than max_length {self.most}."
        cure = f"{self._raise}et data.too_long: drop, truncate or split."
        raise DataError(what, cure)

    def check_left(self, left: int, of: int, owner: str = "", rows: str = "rows") -> None:
        """Raise DataError where dropping took most of the rows; owner: which set's, " of NAME"; rows: which of it."""
        if of and left < of * MOST_DROPPED:
            what = f"{of - left} of {of} {rows}{owner} are longer than max_length {self.most} and would be left out."
            raise DataError(what, f"{self._raise}et data.too_long: truncate or split.")

    @property
    def _raise(self) -> str:
        """How a cure begins that ends in setting something else."""
        return "The model reads no more. S" if self.of_model else "Raise data.max_length, or s"


def truncated(row: TokenRow, most: int, lead: int, text: bool = False) -> tuple[TokenRow, str]:
    """At most `most` tokens, and what to say of it.

    The beginning goes, as where a prompt is too long for a model; `lead` stays. An answer that is too long with one
    token before it keeps its beginning, behind half a row of its prompt. What is left of an earlier answer that the
    cut falls into is context only. Where a conversation is trained on as a whole, its beginning goes too; plain text
    (`text`) keeps it.
    """
    answer, end = _last_answer(row), len(row.ids)
    all_trained = not text and answer <= max(1, lead)
    whole = all_trained or end - answer + lead < most
    start = end - most + lead if whole else max(lead, answer - most // 2)
    row = _without_rest(row, start, answer)
    cut = _taken(row, np.r_[0:lead, start : start + most - lead], 0)
    return cut, CUT_ALL if all_trained else CUT_HEAD if whole else CUT_TAIL


def _without_rest(row: TokenRow, start: int, answer: int) -> TokenRow:
    """The row without the targets that begin at `start`, if that is before the last answer: the question and the
    header of what they go on with are lost, so they would teach to begin in the middle."""
    if start >= answer or not row.scored[start]:
        return row
    scored = row.scored.copy()
    scored[start : start + int(np.argmin(scored[start:]))] = False
    return replace(row, scored=scored)


def parts(row: TokenRow, most: int, stride: int) -> Iterator[TokenRow]:
    """The row as rows of at most `most` tokens, neighbours sharing `stride` tokens (at least one) as context.

    Every target is a target of exactly one part. Parts without a target are left out.
    """
    start, done = 0, 0
    while done < len(row.ids):
        end = min(start + most, len(row.ids))
        part = _taken(row, np.arange(start, end), done - start)
        if part.scored.any():
            yield part
        start, done = max(start + 1, end - max(1, stride)), end


def _last_answer(row: TokenRow) -> int:
    """Where the last unbroken stretch of targets begins."""
    gaps = np.flatnonzero(~row.scored)
    return int(gaps[-1]) + 1 if len(gaps) else 0


def _taken(row: TokenRow, index: np.ndarray, fresh: int) -> TokenRow:
    """The tokens at `index`; targets only from the `fresh`-th on."""
    scored = row.scored[index].copy()
    scored[: max(1, fresh)] = False
    numbers = {name: values[index] for name, values in row.numbers.items()}
    return replace(row, ids=row.ids[index], scored=scored, numbers=numbers)
