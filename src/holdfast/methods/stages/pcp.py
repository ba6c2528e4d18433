"""PCP: first go on with pre-training on texts in the task's own prompt with labels of the base, then learn the task.

    stage 1: loss = mean over all tokens of -log p(token) on rows  prompt(x) + pseudo-label(x)
    stage 2: the plan as it is, with the given answers

pseudo-label(x): of the task's different answers the one that the base finds likeliest behind the prompt. Texts: the
prompts of the rows in `sources`, files of unlabelled text in the same prompt whose own answers are not looked at, or
else the task's own prompts. Given answers are never overwritten: the task's rows come as they are in stage 2, which
draws nothing from these. What other methods mix in, such as Replay, is in both stages. `share` is stage 1's part of
the steps.
Differences: the paper labels with a model tuned on the few given labels, pre-trains a masked model for many epochs,
and begins stage 2 from that checkpoint with a new optimizer; so does stage 2 here, in one run.
Pitfalls: wrong pseudo-labels are learnt. Many steps on one narrow format are format specialisation itself: keep
`share` low and mix general text in. It was made for small encoders and few labels, and may cost what this library is
there to keep.
Cost: a forward of each text with each answer before training; stage 1's steps. Combine with: everything without stages
of its own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.data.asked import Reader
from holdfast.data.encoder import encoder_of
from holdfast.data.mix import Mix, Source
from holdfast.engine.base import token_logp
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Stage
from holdfast.methods.data._few import few
from holdfast.methods.data.replay import read_sources
from holdfast.services import Context

Answer = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PCP(Method):
    """Prompt-based continued pre-training (Shi and Lipani, NeurIPS 2023), arXiv 2305.01711."""

    share: float = 0.2  # ours: of the steps; the paper: 100 epochs over the texts
    sources: tuple[str, ...] = ()  # files of texts in the task's prompt; () is the task's own prompts
    learning_rate: float | None = None  # of stage 1; None is the run's
    texts: int = 512  # ours: most texts
    labels: int = 64  # ours: most different answers

    paper: ClassVar = Paper("Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner", "2305.01711",
                            "read in the README of the official code")  # fmt: skip
    does: ClassVar = "goes on with pre-training on texts in the task's prompt with labels of the base, then learns it"

    def off(self) -> bool:
        return self.share == 0

    @property
    def copies_rows(self):  # type: ignore[override]
        return not self.sources

    def check(self, ctx: Context) -> None:
        if not 0 <= self.share < 1 or self.texts < 1 or self.labels < 2:
            raise PlanError("PCP needs share of 0 or more and below 1, texts of 1 and labels of 2.", "Mend them.")

    def stages(self) -> tuple[Stage, ...]:
        first = Stage("further pre-training", self.share, learning_rate=self.learning_rate, without=("task",))
        return first, Stage("tune", 1 - self.share, without=(self.name,))

    def data(self, mix: Mix, ctx: Context) -> Mix:
        answers = sorted({tuple(r.predicted[r.scored].tolist()) for r in mix.task})
        if not 2 <= len(answers) <= self.labels:
            what = f"PCP labels texts with the answers of the task, but it has {len(answers)} different ones."
            raise PlanError(what, f"Use it for tasks of 2 to {self.labels} labels (PCP.labels), or leave it out.")
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        rows = few(mix.trained, self.texts, self.name, ctx)
        if self.sources:
            rows = read_sources(self.sources, ctx, owner="task", most=self.texts)
        longest = ctx.max_length - max(map(len, answers))
        asked = [a for r in rows if (a := reader.read(r)) and len(a.ids) <= longest]
        prompts = list(dict.fromkeys(tuple(a.ids) for a in asked))
        if not prompts:
            raise PlanError("PCP found no text with a prompt to label.", "Give rows of prompt and completion.")
        chosen = pseudo_labels(ctx, prompts, answers)
        counts = Counter(reader.text([t for t in c if t not in reader.encoder.stops]).strip() for c in chosen)
        said = ", ".join(f"{label} {n}" for label, n in counts.most_common(8))
        ctx.notes.append(f"PCP labels {len(prompts)} texts by the base: {said}")
        made = [token_row([*p, *c], 1, "task", self.name) for p, c in zip(prompts, chosen, strict=True)]
        return mix.add(Source(self.name, made, self.share))


def pseudo_labels(ctx: Context, prompts: Sequence[Answer], answers: Sequence[Answer]) -> list[Answer]:
    """For each prompt the answer of the highest probability under the base."""
    rows: list[TokenRow] = [token_row([*p, *a], len(p), "PCP", "PCP") for p in prompts for a in answers]
    scores = np.asarray([logp.sum() for logp in token_logp(ctx.model, rows)]).reshape(len(prompts), len(answers))
    return [answers[n] for n in scores.argmax(1)]
