"""Few-shot prompts as token rows, shared by everything that trains on them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from holdfast.data.asked import Reader
from holdfast.data.encoder import Encoder
from holdfast.data.fewshot import Prompt
from holdfast.data.mix import Mix
from holdfast.data.rows import Row
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.services import Context


def encode_shots(
    prompt: Prompt,
    tokenizer: Any,
    owner: str,
    *,
    every_token: bool,
    source: str | None = None,
) -> TokenRow:
    """Tokenise a finished few-shot prompt; targets are all tokens, or the answers of all shots and the query."""
    encoder, context = Encoder(tokenizer), prompt.context
    head, places = encoder.marked(context, [n for span in prompt.spans for n in span if n <= len(context)])
    (split,) = encoder.join([(context, prompt.answer + prompt.stop)], end=False)
    inside = np.zeros(len(context) + 1, dtype=bool)
    for start, end in prompt.spans:
        inside[start:end] = True
    # the last answer and its end follow the context
    answers = np.array([bool(inside[a:b].any()) for a, b in places] + [True] * (len(split.ids) - len(head)))
    answers[0] = False
    ids = np.asarray(split.ids, dtype=np.int64)
    if every_token:
        return replace(token_row(ids, 1, owner, source or owner), gold=answers)
    return TokenRow(ids, answers, owner, source or owner, gold=answers)


def task_shots(rows: Sequence[Row], ctx: Context, source: str) -> TokenRow:
    """Rows of the task one after the other, the last one is the query; targets are all answers."""
    text, spans = "", []
    for n, row in enumerate(rows):
        text += row.prompt if n == 0 else "\n\n" + row.prompt
        spans.append((len(text), len(text) + len(row.completion)))
        text += row.completion
    context = type(rows[0].prompt)(text[: spans[-1][0]])  # what a chat template wrote keeps its mark
    prompt = Prompt(context, rows[-1].completion, "", tuple(spans[:-1]))
    return encode_shots(prompt, ctx.tokenizer, "task", every_token=False, source=source)


def fitting(write: Callable[[int], TokenRow], count: int, most: int) -> TokenRow:
    """The row of as many of `count` examples as fit into `most` tokens; of one example if none do."""
    row = write(count)
    if len(row.ids) <= most:
        return row
    count = max(1, min(count - 1, int(count * most / len(row.ids))))  # near; examples are of unequal length
    row = write(count)
    while len(row.ids) > most and count > 1:
        count -= 1
        row = write(count)
    while len((longer := write(count + 1)).ids) <= most:
        row, count = longer, count + 1
    return row


def last_answer(row: TokenRow) -> TokenRow:
    """Keep only the last run of targets."""
    scored = row.scored.copy()
    end = len(scored) - scored[::-1].argmax()
    start = end
    while start and scored[start - 1]:
        start -= 1
    scored[:start] = False
    return replace(row, scored=scored)


def task_examples(mix: Mix, ctx: Context, name: str) -> list[Row]:
    """The rows of the task that train, as text, one for each prompt.

    Raises:
        PlanError: fewer than two.
    """
    reader = Reader(Encoder(ctx.tokenizer))
    asked = [a for r in mix.trained if (a := reader.read(r))]
    known = {a.prompt: Row(a.prompt, a.lead + a.answer) for a in asked}
    if len(known) < 2:
        what = f"{name} takes examples from the task, but {len(known)} of its rows are a prompt and an answer."
        raise PlanError(what, "Give prompt/completion rows, or set source: anchors.")
    return list(known.values())
