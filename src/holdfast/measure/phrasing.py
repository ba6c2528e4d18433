"""How far a model depends on how it is asked: the same test rows in several phrasings (arXiv 2306.11270).

Ask before and after tuning: a model tuned on one phrasing may do well on it and worse on all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch

from holdfast.data.phrasing import reworded_rows
from holdfast.data.rows import Row
from holdfast.errors import DataError
from holdfast.measure.tuned_task import score_task

SEEN = "as the rows are"


@dataclass(frozen=True)
class Spread:
    """Scores by phrasing, item by item; `SEEN` is that of the rows themselves."""

    items: Mapping[str, Sequence[float]]

    @property
    def by(self) -> dict[str, float]:
        """The mean score of each phrasing."""
        return {name: fmean(scores) for name, scores in self.items.items()}

    @property
    def mean(self) -> float:
        return fmean(self.by.values())

    @property
    def deviation(self) -> float:
        """Standard deviation of the phrasings' scores."""
        return pstdev(self.by.values())

    @property
    def worst(self) -> float:
        return min(self.by.values())

    @property
    def drop(self) -> float:
        """The score of the rows as they are minus the mean of the other phrasings."""
        return self.by[SEEN] - fmean(score for name, score in self.by.items() if name != SEEN)


def spread(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    phrasings: Sequence[str],
    *,
    instruction: str = "",
    labels: Sequence[str] | None = None,
    soft_prompt: torch.Tensor | None = None,
) -> Spread:
    """Score test rows as they are and in each phrasing.

    Args:
        phrasings: what stands in the place of `instruction` in the prompts, or on a line before them where it is "".
        labels: the completions to choose from; None: the whole answer must be the likeliest.
        soft_prompt: as `Scorer` takes it.

    Raises:
        DataError: no phrasings, or a row that cannot be said so.
    """
    asked = {SEEN: list(rows), **{p: reworded_rows(rows, instruction, p) for p in phrasings}}
    short = next((p for p, said in asked.items() if len(said) < len(rows)), None)
    if short is not None or len(asked) < 2:
        what = f"Not every row can be said as {short!r}." if short else "There are no phrasings to compare."
        raise DataError(what, f"Give phrasings for an instruction that stands in all prompts (now {instruction!r}).")
    items = {
        name: [float(i["correct"]) for i in score_task(model, tokenizer, said, labels, soft_prompt=soft_prompt)]
        for name, said in asked.items()
    }
    return Spread(items)
