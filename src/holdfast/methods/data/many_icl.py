"""ManyICL: rows of as many solved examples of one task as the context holds, every answer trained on.

    row = x_1 y_1 x_2 y_2 ... x_n y_n,   loss = mean over the tokens of all y_i of -log p(y_i | x_1 y_1 ... x_i)

So the first answer is trained without examples and the i-th behind i - 1 of them, in one forward; no example is read
as context alone. Of the tokens of the mix `share` are such rows; the rest are the task's own. A row holds one task, no
example twice, in random order; it is cut between examples, never inside one. Tasks are the built-in anchor tasks in
many formats ("anchors"), the task itself ("task"), or one after the other ("both"). Rows of the task end as they do in
training, so n = 1 is the row itself; of chats every answer ends its turn, and of plain rows, which stand a blank line
apart, the last one ends.
InContextMix has few examples and trains the last answer. Rows of one task alone do not protect other tasks
(ProMoT's table), so "anchors" is the default; the paper mixes many tasks and trains on such rows only.
Methods that hold rows of the task out stand before it in the plan; else examples of the task are refused.
Long answers of one label in a row teach to copy it: shuffle and balance. `data.max_length` bounds a row.
Cost: the rows' tokens, in one long forward each. Combine with: everything.
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
from holdfast.measure.tasks import AnchorTask, anchor_tasks
from holdfast.method import Method, Paper
from holdfast.methods.data._shots import encode_shots, fitting, task_examples, task_shots
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class ManyICL(Method):
    """Many-shot in-context fine-tuning (He et al. 2025), arXiv 2506.11103."""

    share: float = 0.2  # ours: the paper trains on such rows alone
    unit: str = "tokens"  # ours: a row is long
    source: str = "anchors"  # ours
    shots: int = 256  # ours: most examples in a row; the paper fills the context with hundreds
    max_tokens: int | None = None  # ours: of a row; None is data.max_length
    tasks: tuple[str, ...] | None = None  # anchor tasks; None is all
    pool: int = 64  # ours: distinct rows
    seed: int = 0

    paper: ClassVar = Paper("You Only Fine-tune Once: Many-Shot In-Context Fine-Tuning for Large Language Model",
                            "2506.11103", "read in the abstract; no code was released")  # fmt: skip
    does: ClassVar = "adds rows of many solved examples of one task, with every answer trained on"
    strengths: ClassVar = ("share",)
    odds: ClassVar = strengths

    @property
    def copies_rows(self):  # type: ignore[override]
        return self.source != "anchors"

    def off(self) -> bool:
        return self.share == 0

    def check(self, ctx: Context) -> None:
        if self.source not in ("anchors", "task", "both"):
            raise PlanError(f"ManyICL.source is {self.source!r}.", "Use 'anchors', 'task' or 'both'.")
        if not 0 <= self.share < 1 or self.unit not in ("examples", "tokens"):
            what = "ManyICL needs share of 0 or more and below 1, and unit 'examples' or 'tokens'."
            raise PlanError(what, "Mend them.")
        if min(self.shots, self.pool) < 1 or (self.max_tokens is not None and self.max_tokens < 8):
            raise PlanError("ManyICL needs shots and pool of at least 1, and max_tokens of at least 8.", "Mend them.")
        if self.source != "anchors" and len({r.prompt for r in ctx.rows}) < 2:
            raise PlanError(
                "ManyICL takes its examples from the task, but its rows are not known as prompts and answers.",
                "Give prompt/completion rows, or set source: anchors.",
            )
        anchor_tasks(self.tasks)

    def data(self, mix: Mix, ctx: Context) -> Mix:
        most = min(self.max_tokens or ctx.max_length, ctx.max_length)
        known = [] if self.source == "anchors" else task_examples(mix, ctx, self.name)
        rows = [self.row(n, ctx, most, known) for n in range(self.pool)]
        fits = [r for r in rows if len(r.ids) <= most]
        return mix.add(Source(self.name, fits, self.share, self.unit))

    def row(self, n: int, ctx: Context, most: int, known: Sequence[Row] = ()) -> TokenRow:
        """The n-th row, of at most `most` tokens (more, if one example alone has more); `known`: the task's."""
        draw = random.Random(f"ManyICL/{self.seed}/{n}")
        if self.source == "task" or (self.source == "both" and n % 2):
            picked = draw.sample(list(known), min(self.shots, len(known)))
            return fitting(lambda k: task_shots(picked[:k], ctx, self.name), len(picked), most)
        tasks = anchor_tasks(self.tasks)
        return self._of_anchor(tasks[n % len(tasks)], draw, ctx, most)

    def _of_anchor(self, task: AnchorTask, draw: random.Random, ctx: Context, most: int) -> TokenRow:
        form = draw.choice(formats_for(ctx.tokenizer))
        items = list(dict(task.items).items())
        picked = draw.sample(items, min(self.shots, len(items)))

        def write(k: int) -> TokenRow:
            prompt = build(
                form, picked[: k - 1], picked[k - 1], instruction=task.instruction, names=task.names,
                tokenizer=ctx.tokenizer,
            )  # fmt: skip
            return encode_shots(prompt, ctx.tokenizer, "task", every_token=False, source=self.name)

        return fitting(write, len(picked), most)
