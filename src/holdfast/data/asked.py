"""Tokenised rows as prompt and answer again, and prompts that show an answer.

Rows of a trainer come as tokens alone. A prompt with special tokens of its own was written by a chat template; more
text then goes to the end of its last user turn, before what the template writes to let the model answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from holdfast.data.encoder import Encoder, Tokens
from holdfast.data.rendered import Rendered
from holdfast.data.targets import weighed
from holdfast.engine.pack import WEIGHT, TokenRow, token_row
from holdfast.errors import DataError

MARK = "holdfast-mark"
LOST = "\ufffd"  # what half a character reads as


@dataclass(frozen=True)
class Asked:
    """One row, read.

    ids: tokens of the prompt; prompt: its text (`Rendered` where a chat template wrote it); lead: blanks before the
    answer; answer: its text, without blanks around it; tail: text of the tokens that end it, if it has its own.
    """

    ids: Tokens
    prompt: str
    lead: str
    answer: str
    tail: str

    @property
    def one_line(self) -> bool:
        """Whether what follows the first line of an answer would be another text."""
        return not isinstance(self.prompt, Rendered) and "\n" not in self.answer


class Reader:
    """Reads the rows of one tokenizer."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.tokenizer = encoder, encoder.tokenizer

    def read(self, row: TokenRow) -> Asked | None:
        """None for a row without a prompt, or with more than one answer."""
        at = np.flatnonzero(row.scored)
        begin = len(self.encoder.begin)
        if not len(at) or at[0] <= max(1, begin) or len(at) != len(row.ids) - at[0]:
            return None
        ids, said = row.ids[: at[0]].tolist(), row.predicted[at[0] :].tolist()
        end = len(said)
        while end and self._ends(said[end - 1]):
            end -= 1
        text, tail = self.text(said[:end]), self.text(said[end:])
        if tail == self.text([self.encoder.end] if self.encoder.end is not None else []):
            tail = ""  # every answer gets this one
        answer = text.strip()
        lead = text[: len(text) - len(text.lstrip())]
        return Asked(ids, self._prompt(ids, begin), lead, answer, text[len(text.rstrip()) :] + tail)

    def _prompt(self, ids: Tokens, begin: int) -> str:
        bare = ids[begin:] if ids[:begin] == self.encoder.begin else ids
        special = set(self.tokenizer.all_special_ids) & set(bare)
        return Rendered(self.text(ids)) if special else self.text(bare)

    def _ends(self, token: int) -> bool:
        return token in self.encoder.stops or token in self.tokenizer.all_special_ids or not self.text([token]).strip()

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def said(self, ids: Sequence[int], asked: Asked, ended: bool) -> str | None:
        """The text of an answer that the model gave to `asked`, without blanks around it; None if there is none.

        `ended` asks for an answer that came to its end.

        Where the row's own answer is one line behind a plain prompt, so is this: a model without a chat template goes
        on with the next text.
        """
        ends = bool(ids) and ids[-1] in self.encoder.stops
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True).lstrip()
        if asked.one_line and "\n" in text:
            text, ends = text.split("\n")[0], True
        text = text.strip()
        return text if (ends or not ended) and text and LOST not in text else None

    def answered(self, asked: Asked, answer: str, row: TokenRow, max_length: int) -> TokenRow | None:
        """`row` with another answer, tokenised, ended and weighed as its own; None where that cannot be done."""
        try:
            split = self.encoder.join([(asked.prompt, asked.lead + answer + asked.tail)], end=True)[0]
        except DataError:
            return None
        if len(split.ids) > max_length or not self.encoder.says(split.answer):
            return None
        made, weights = token_row(split.ids, split.start, row.owner, row.source), row.numbers.get(WEIGHT)
        return made if weights is None else weighed(made, np.full(len(made.ids), weights[row.scored][0]))

    @cached_property
    def _opening(self) -> str | None:
        """What a chat template writes behind the last user turn."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        turn = [{"role": "user", "content": MARK}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return text.split(MARK)[-1] if MARK in text else None

    def filled(self, asked: Asked, template: str, values: Mapping[str, str]) -> Tokens | None:
        """Tokens of a prompt by `template`: {prompt} and the names of `values` in braces stand for their texts.

        A chat must begin with {prompt} and hold it once. None where the template of the chat is not found again.
        """
        if not isinstance(asked.prompt, Rendered):
            return self.encoder.prompts([_fill(template, {"prompt": asked.prompt, **values})])[0]
        opening = self._opening
        if not opening or not asked.prompt.endswith(opening):
            return None
        more = _fill(template.removeprefix("{prompt}"), values)
        return self.encoder.prompts([Rendered(asked.prompt[: -len(opening)] + more + opening)])[0]


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Every {name} once, so that braces in a text stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)


def empty_turn(tokenizer: Any) -> Rendered:
    """What a chat template writes before the answer to a user who said nothing."""
    turn = [{"role": "user", "content": ""}]
    return Rendered(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def fits_chats(template: str) -> bool:
    """Whether a chat can be asked by `template`."""
    return template.startswith("{prompt}") and template.count("{prompt}") == 1
