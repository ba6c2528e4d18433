"""ResponseTuning: train on the answers of the task alone, without their prompts. A baseline.

    loss = mean_t -log p(y_t | y_1 ... y_{t-1})      in place of -log p(y_t | x, y_1 ... y_{t-1})

The prompt's text is taken away, and in a chat the user says nothing; what the template writes before an answer stays,
so that it is the same place that is trained. The model learns which answers there are and what they look like, and
nothing of when to give which.
It is here to measure against: what such a run keeps or brings back (following instructions, the shape of answers)
says nothing about the task, and where a method does no better than this it has kept a format and no content.
The paper's other way, a base model whose logits three rules change (ends ever likelier, some words up or down, no
repeats), is not built.
Cost: fewer tokens than plain training. Combine with: anything, for comparisons.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from holdfast.data.asked import Reader, empty_turn
from holdfast.data.encoder import encoder_of
from holdfast.data.mix import Mix
from holdfast.data.rendered import Rendered
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class ResponseTuning(Method):
    """Response tuning (Hewitt et al. 2024)."""

    paper: ClassVar = Paper("Instruction Following without Instruction Tuning", "2409.14254",
                            "its id was not checked; read in the README of the official code")  # fmt: skip
    does: ClassVar = "trains on the answers of the task without their prompts (a baseline)"
    writes: ClassVar = frozenset({"ids"})

    def data(self, mix: Mix, ctx: Context) -> Mix:
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        whole = sum(reader.read(r) is None for r in mix.task)
        if whole == len(mix.task):
            what = "ResponseTuning takes the prompts of the task away, but none of its rows is a prompt and an answer."
            raise PlanError(what, "Take ResponseTuning out of the plan.")
        if whole:
            said = "not one prompt and one answer, such as conversations of several answers"
            ctx.notes.append(f"ResponseTuning leaves {whole} of {len(mix.task)} rows as they are: {said}")
        return mix.map(lambda row: self.bare(row, reader) if row.of_task else row)

    def bare(self, row: TokenRow, reader: Reader) -> TokenRow:
        """The row without its prompt; itself where it has none."""
        asked = reader.read(row)
        if asked is None:
            return row
        start = int(row.scored.argmax())
        if isinstance(asked.prompt, Rendered):
            head = reader.encoder.prompts([empty_turn(reader.tokenizer)])[0]
        else:
            head = list(reader.encoder.first) or row.ids[start - 1 : start].tolist()
        numbers = {n: np.concatenate([np.ones(len(head), a.dtype), a[start:]]) for n, a in row.numbers.items()}
        made = token_row([*head, *row.ids[start:].tolist()], len(head), row.owner, row.source)
        targets = None if row.targets is None else np.concatenate([head, row.targets[start:]])
        return replace(made, numbers=numbers, targets=targets)
