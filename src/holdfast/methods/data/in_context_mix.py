"""InContextMix: add few-shot prompts with gold answers to the training data.

Of all examples, `share` are few-shot prompts; N = n_task / (1 - share), every task row is still seen once an epoch.
Demonstrations come from anchor tasks ("anchors"), from the task itself ("task"), or half of each ("both"). The query
is never its own demonstration; the number of shots and the format vary from row to row. supervision "final": only the
last answer carries loss; "all": every answer.
Paper evidence: few-shot rows of the same task alone do not protect other tasks (ProMoT, Table: 0.03 on TriviaQA), so
"anchors" is the default. Shares count examples (`unit`); a 4-shot row is some five times longer than its query.
Cost: the extra rows' tokens. Combine with: everything.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from holdfast.data.fewshot import build, formats_for
from holdfast.data.mix import Mix, Source
from holdfast.data.rows import Row
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.measure.tasks import anchor_tasks
from holdfast.method import Method, Paper
from holdfast.methods.data._shots import encode_shots, fitting, last_answer, task_examples, task_shots
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class InContextMix(Method):
    """Few-shot-format mixing, after arXiv 2310.13448 (the ratios are ours)."""

    share: float = 0.2  # ours: from no paper
    source: str = "anchors"
    shots: tuple[int, int] = (1, 4)  # ours: uniform, instead of a fixed 3
    supervision: str = "final"  # ours
    unit: str = "examples"
    tasks: tuple[str, ...] | None = None
    pool: int = 1024
    seed: int = 0

    paper: ClassVar = Paper("Steering Large Language Models for Machine Translation with Finetuning and In-Context "
                            "Learning", "2310.13448", "the default ratio comes from no paper")  # fmt: skip
    does: ClassVar = "adds few-shot prompts with gold answers to the training data"
    strengths: ClassVar = ("share",)
    odds: ClassVar = strengths

    @property
    def copies_rows(self):  # type: ignore[override]
        return self.source != "anchors"

    def off(self) -> bool:
        return self.share == 0

    def check(self, ctx: Context) -> None:
        if self.source not in ("anchors", "task", "both"):
            raise PlanError(f"InContextMix.source is {self.source!r}.", "Use 'anchors', 'task' or 'both'.")
        if self.supervision not in ("final", "all"):
            raise PlanError(f"InContextMix.supervision is {self.supervision!r}.", "Use 'final' or 'all'.")
        if not 0 <= self.share < 1:
            raise PlanError(f"InContextMix.share is {self.share}.", "Use a part of the mix, 0 or more and below 1.")
        if len(self.shots) != 2 or not 1 <= self.shots[0] <= self.shots[1]:
            raise PlanError(f"InContextMix.shots is {self.shots}.", "Give fewest and most, such as [1, 4].")
        known = len({r.prompt for r in ctx.rows})
        if self.source != "anchors" and known < self.shots[1] + 1:
            raise PlanError(
                f"InContextMix takes its shots from the task, but only {known} different prompts are known.",
                "Give prompt/completion rows, or set source: anchors.",
            )
        anchor_tasks(self.tasks)

    def data(self, mix: Mix, ctx: Context) -> Mix:
        # rows that some method holds out are no examples either
        known = task_examples(mix, ctx, self.name) if self.copies_rows and mix.held else ctx.rows
        rows = [self.row(n, ctx, known) for n in range(self.pool)]
        fits = [r for r in rows if len(r.ids) <= ctx.max_length]
        return mix.add(Source(self.name, fits, self.share, self.unit))

    def row(self, n: int, ctx: Context, known: Sequence[Row] | None = None) -> TokenRow:
        """The n-th few-shot row; `known`: the task's rows that may stand in it, None is all."""
        known = ctx.rows if known is None else known
        draw = random.Random(f"InContextMix/{self.seed}/{n}")
        k = draw.randint(*self.shots)
        from_task = self.source == "task" or (self.source == "both" and n % 2)
        if from_task:
            query = draw.choice(known)
            others = [r for r in known if r.prompt != query.prompt]  # a duplicate would show the answer
            picked = [*draw.sample(others, k), query]
            whole = fitting(lambda n: task_shots(picked[-n:], ctx, self.name), len(picked), ctx.max_length)
            return whole if self.supervision == "all" else last_answer(whole)
        tasks = anchor_tasks(self.tasks)
        task, form = tasks[n % len(tasks)], draw.choice(formats_for(ctx.tokenizer))
        pairs = draw.sample(task.items, k + 1)
        prompt = build(
            form,
            pairs[:-1],
            pairs[-1],
            instruction=task.instruction,
            names=task.names,
            tokenizer=ctx.tokenizer,
        )
        whole = encode_shots(prompt, ctx.tokenizer, "task", every_token=False, source=self.name)
        return whole if self.supervision == "all" else last_answer(whole)
