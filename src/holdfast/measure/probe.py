"""Probes: what every suite is made of; `asking` is the one way to score them.

A suite is a list of probes, sorted into tasks. A probe is a context and what may follow it; its kind says how the
model's answer becomes a score between 0 and 1:

    exact      1 if the greedy answer is exactly answers[right] and then ends (no generation needed)
    begins     1 if the greedy text begins with answers[right], whatever follows
    choice     1 if answers[right] is the likeliest of `answers`
    calibrated 1 - Brier / 2 of the probabilities of `answers`: 1 is sure and right, 0 is sure and wrong
    likelihood probability of a token of answers[right], its geometric mean: exp(-loss)
    generate   what `judge` says of the greedy text

An answer of the kinds exact, choice and calibrated counts with its end, or "1" would win where the model says "10". An
answer that ends in a newline, or in a token that stops generation, brings its end; any other may end as training ends
it, with the end-of-text token, or with a line (`asking.ENDS`): its probability is then the sum over these. Probes that
are `open_ended` ask for beginnings only.

Scores of two models on the same suite are paired item by item (`compare`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.data.fewshot import can_chat
from holdfast.data.rendered import Rendered

Kind = Literal["exact", "begins", "choice", "calibrated", "likelihood", "generate"]


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        task: the task of the suite it belongs to.
        id: unique in the suite and the same in every version of it.
        kind: how it is scored, see above.
        context: what the model reads.
        answers: what may follow; the closed set for "choice" and "calibrated", none for "generate", else one. Text is
            joined as it stands.
        right: index of the right one.
        cluster: what it shares with other probes (demonstrations, a fact asked in several ways).
        shots: number of demonstrations in the context, where a curve over them is wanted.
        judge: for "generate": output -> score in [0, 1].
        marks: for "generate": output -> further figures in [0, 1] by name, which enter no verdict.
        expected: for "generate": in words, what a good answer is.
        max_tokens: for "generate": longest answer.
        with_special: for "generate": special tokens stay in the output, except those that end it.
        answer_lengths: for "choice": divide each log-likelihood by this many units (bytes, tokens); None sums.
        open_ended: the answers are openings or cannot be mistaken, so that what ends them does not count.
    """

    task: str
    id: str
    kind: Kind
    context: str
    answers: tuple[str, ...] = ()
    right: int = 0
    cluster: str = ""
    shots: int | None = None
    judge: Callable[[str], float] | None = None
    marks: Callable[[str], dict[str, float]] | None = None
    expected: str = ""
    max_tokens: int = 48
    with_special: bool = False
    answer_lengths: tuple[int, ...] | None = None
    open_ended: bool = False

    @property
    def answer(self) -> str:
        """What a good answer is, for showing."""
        return self.answers[self.right] if self.answers else self.expected


@dataclass(frozen=True)
class Group:
    """One task of a suite; `clustered`: its probes of one cluster are not independent."""

    name: str
    version: int
    chance: float
    metric: str
    clustered: bool = False


@dataclass(frozen=True)
class Suite:
    """Named probes. `settings` is whatever else decided them; two measurements pair only if it is equal.

    note: in words, why there is nothing to ask of this model.
    """

    name: str
    groups: tuple[Group, ...]
    probes: tuple[Probe, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Ask:
    """What a suite is built from.

    Attributes:
        tokenizer: of the model (formats and chat template depend on it; both models of a pair must share it).
        num_fewshot: demonstrations, where a suite has them.
        limit: items of each task; None is the suite's own default.
        seed: draws the items and demonstrations.
        labels: the answers of the tuned task, where a suite looks for them in other answers.
    """

    tokenizer: Any
    num_fewshot: int = 8
    limit: int | None = None
    seed: int = 0
    labels: tuple[str, ...] = ()

    def chat(self, request: str) -> str:
        """`request` as one user turn in the model's own chat template, or as plain text (`can_chat`)."""
        if not can_chat(self.tokenizer, shots=0):
            return f"Question: {request}\nAnswer:"
        turns = [{"role": "user", "content": request}]
        return Rendered(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def lead(self, answer: str) -> str:
        """`answer` as it follows `chat`: with a blank where the context ends in a colon."""
        return answer if can_chat(self.tokenizer, shots=0) else f" {answer}"


def counts_end(p: Probe) -> bool:
    """Whether the end of its answers belongs to them."""
    return p.kind in ("exact", "choice", "calibrated") and not p.open_ended
