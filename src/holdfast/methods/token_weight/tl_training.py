"""TLTraining: in answers that are names, weight the tokens that tell one name from another.

    loss = sum_t w_t * (-log p(y_t)) / sum_t w_t,   sums over the whole step
    w_t = min(|rest| / |key|, max_weight) for the key tokens of a row if |key| < |rest|, else 1

key: the first token of the answer, and every token behind the longest prefix that it shares with some other answer; of
an answer that calls a tool the prefix counts up to the end of the tool's name (the first one's, of several calls), so
no argument is key. rest: its other tokens, the end too. Once the key is right the rest of a name follows by itself,
and plain cross-entropy spends most of its weight there. max_weight 1 is plain fine-tuning.
Differences: this is one of three parts of TL-Training, the prioritising of key tokens. There names are the tools of a
prompt; here they are the answers in the task's rows, compared as tokens. Calls are known by the ways in which public
models write them (`measure.calls`). The released code leaves the ends of arguments out of |rest|. Dropping turns with
faulty calls is a matter of the data, and its reward stage (PPO) is left out. Rows that other methods mix in have
weight 1.
Where every answer is free text most tokens are rest and few are key, all at the beginning: not what it is for.
Weighting unlikely tokens moves the model more. Cost: none.
Combine with: KLToBase or ICLAnchor; every adapt method.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch

from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.measure.calls import name_ends
from holdfast.method import Method, Paper
from holdfast.services import Context, View

NUMBER = "TLTraining"  # under which the weights stand in the rows
Prefix = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TLTraining(Method):
    """Prioritising key tokens, from TL-Training (Ye et al., EMNLP 2025), arXiv 2412.15495."""

    max_weight: float = 9.0  # released code

    paper: ClassVar = Paper("TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool "
                            "Use", "2412.15495", "read in summaries and in the released code")  # fmt: skip
    does: ClassVar = "weights the tokens that tell one answer of the task from another"
    writes: ClassVar = frozenset({NUMBER})

    def off(self) -> bool:
        return self.max_weight == 1

    def check(self, ctx: Context) -> None:
        if self.max_weight < 1:
            raise PlanError(f"TLTraining.max_weight is {self.max_weight}.", "Use 1 or more.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        parting = forks(named(r, ctx.tokenizer) for r in mix.task)
        if not any(self.weighted(r, parting).numbers[NUMBER].max() > 1 for r in mix.task):
            raise PlanError(
                "TLTraining weights the tokens that tell answers apart, but no answer of the task has more others.",
                "Take TLTraining out of the plan.",
            )
        return mix.map(lambda row: self.weighted(row, parting) if row.of_task else row)

    def weighted(self, row: TokenRow, parting: set[Prefix]) -> TokenRow:
        """The row with the weights of its tokens among its numbers."""
        told = key_tokens(answer(row), parting)
        key, rest = sum(told), len(told) - sum(told)
        weights = np.ones(len(row.ids), dtype=np.float32)
        if 0 < key < rest:
            weights[np.flatnonzero(row.scored)[told]] = min(rest / key, self.max_weight)
        return replace(row, numbers={**row.numbers, NUMBER: weights})

    def token_weight(self, view: View) -> torch.Tensor | None:
        total = view.total(NUMBER)
        return view.number(NUMBER) * (view.count() / total) if total else None


def answer(row: TokenRow) -> Prefix:
    """The targets of a row."""
    return tuple(row.predicted[row.scored].tolist())


def named(row: TokenRow, tokenizer: Any) -> Prefix:
    """The targets of a row; of a call of a tool those up to the end of the tool's name."""
    said, special = answer(row), {*tokenizer.all_special_ids}
    body = said[: max((n + 1 for n, token in enumerate(said) if token not in special), default=0)]

    def text(n: int) -> str:
        return tokenizer.decode(list(body[:n]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    end = name_ends(text(len(body)))
    return said if end is None else said[: bisect_left(range(len(body)), end, key=lambda n: len(text(n)))]


def forks(answers: Iterable[Prefix]) -> set[Prefix]:
    """The longest prefixes that two answers share; in the order of a dictionary neighbours share them all."""
    return {a[: _shared(a, b)] for a, b in pairwise(sorted(set(answers)))}


def _shared(a: Prefix, b: Prefix) -> int:
    """Tokens that two answers share at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def key_tokens(answer: Prefix, parting: set[Prefix]) -> list[bool]:
    """Of each token of an answer, whether it is the first or stands behind a prefix where answers part."""
    lengths = {len(p) for p in parting}
    return [n == 0 or (n in lengths and answer[:n] in parting) for n in range(len(answer))]
