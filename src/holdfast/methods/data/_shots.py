"""Few-shot prompts as token rows, shared by everything that trains on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from holdfast.data.asked import Reader
from holdfast.data.encoder import Encoder, encoder_of
from holdfast.data.fewshot import Prompt, can_chat
from holdfast.data.mix import Mix
from holdfast.data.rendered import Rendered
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
    row = _encoded(prompt, Encoder(tokenizer), owner, source or owner, end=False)
    return replace(token_row(row.ids, 1, owner, source or owner), gold=row.gold) if every_token else row


def _encoded(prompt: Prompt, encoder: Encoder, owner: str, source: str, *, end: bool) -> TokenRow:
    """Tokens of a prompt and its answer, with all answers as targets; `end`: the last one is ended as rows are."""
    context = prompt.context
    head, places = encoder.marked(context, [n for span in prompt.spans for n in span if n <= len(context)])
    (split,) = encoder.join([(context, prompt.answer + prompt.stop)], end=end)
    inside = np.zeros(len(context) + 1, dtype=bool)
    for first, last in prompt.spans:
        inside[first:last] = True
    # the last answer and its end follow the context
    answers = np.array([bool(inside[a:b].any()) for a, b in places] + [True] * (len(split.ids) - len(head)))
    answers[0] = False
    return TokenRow(np.asarray(split.ids, dtype=np.int64), answers, owner, source, gold=answers)


def task_shots(rows: Sequence[Row], ctx: Context, source: str) -> TokenRow:
    """Rows of the task one after the other, the last one is the query; targets are all answers.

    One row alone has the tokens and targets that it has in training, its end too. Plain rows stand a blank line
    apart. Rows that a chat template wrote become the turns of one conversation: each answer is closed as the template
    closes it, which is a target, and what stands before the first user's words is not said again.
    """
    encoder = encoder_of(ctx.model, ctx.tokenizer)
    join = _join(ctx.tokenizer, encoder, rows[0].prompt)
    text, spans = "", []
    for n, row in enumerate(rows):
        said = join.closed(row.completion) if n < len(rows) - 1 else row.completion
        text += join.later(row.prompt) if n else row.prompt
        spans.append((len(text), len(text) + len(said.rstrip() if join.chat else said)))
        text += said
    context = type(rows[0].prompt)(text[: spans[-1][0]])  # what a chat template wrote keeps its mark
    prompt = Prompt(context, rows[-1].completion, "", tuple(spans[:-1]))
    return _encoded(prompt, encoder, "task", source, end=True)


@dataclass(frozen=True)
class _Join:
    """What stands between two examples.

    first: the first prompt; end: what ends a text; closing, opening: what a chat template writes behind an answer, and
    then before the user's next words ("": not known).
    """

    first: str
    end: str
    closing: str = ""
    opening: str = ""
    bos: str = ""

    @property
    def chat(self) -> bool:
        return isinstance(self.first, Rendered)

    def closed(self, said: str) -> str:
        """An answer that others follow."""
        said = said.removesuffix(self.end)
        return said.rstrip().removesuffix(self.closing.rstrip()) + self.closing if self.chat else said

    def later(self, prompt: str) -> str:
        """A prompt that others precede; of a chat without the beginning that it shares with the first."""
        if not self.chat:
            return "\n\n" + prompt
        head, mark, rest = prompt.partition(self.opening) if self.opening else ("", "", "")
        return mark + rest if mark and self.first.partition(mark)[0] == head else prompt.removeprefix(self.bos)


def _join(tokenizer: Any, encoder: Encoder, first: str) -> _Join:
    end = Reader(encoder).text([] if encoder.end is None else [encoder.end])
    if not isinstance(first, Rendered):
        return _Join(first, end)
    if not can_chat(tokenizer):
        return _Join(first, end, closing=end, bos=tokenizer.bos_token or "")
    user, answer = ({"role": role, "content": "\0"} for role in ("user", "assistant"))
    closing = tokenizer.apply_chat_template([user, answer], tokenize=False).split("\0")[-1]
    *_, between, _ = tokenizer.apply_chat_template([user, answer, user], tokenize=False).split("\0")
    opening = between.removeprefix(closing) if between.startswith(closing) else ""
    return _Join(first, end, closing or end, opening, tokenizer.bos_token or "")


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
    reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
    asked = [a for r in mix.trained if (a := reader.read(r))]
    known = {a.prompt: Row(a.prompt, a.lead + a.answer + a.tail) for a in asked}
    if len(known) < 2:
        what = f"{name} takes examples from the task, but {len(known)} of its rows are a prompt and an answer."
        raise PlanError(what, "Give prompt/completion rows, or set source: anchors.")
    return list(known.values())
