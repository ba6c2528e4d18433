"""Which answers of a conversation are trained on, and where they stand in the rendered text.

A template may mark them itself ({% generation %}). Otherwise the conversation is rendered up to an answer, and with
it: what comes to the first is the answer's, provided that both are how the whole begins. Then each answer is trained
behind exactly the text that inference will show the model before it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.data.messages import Message
from holdfast.data.rendered import Turn
from holdfast.data.talk import FLAGS, WEIGHT, Talk
from holdfast.data.texts import short
from holdfast.errors import DataError

WEIGHED = "answers of {n conversation} have weights of their own, by which the losses of their tokens are multiplied"
CUT = "{n conversation} cut off behind the last answer that is trained on"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ELSE = "Set data.train_on: last, mark the answers in the template with {% generation %}, or make a row of each answer."

MEND = "Mend the template, or set data.train_on: last."

Render = Callable[[int, bool], str]  # the first messages, with the opening of an answer or without


def flag_of(message: Message, i: int, place: str) -> tuple[str, float] | None:
    """The key that says whether a message is trained on, and its value: 0, 1, or a weight of the losses of its tokens.

    Of several keys one that says no decides, else the weight.

    Raises:
        DataError: a weight that is no number from 0 on, or another key that is neither 0 nor 1.
    """
    found = [(key, message[key]) for key in FLAGS if message.get(key) is not None] if len(message) > 2 else []
    for key, value in found:
        weighs = isinstance(value, int | float) and 0 <= value < math.inf  # not of NaN either
        if not weighs or (key != WEIGHT and value not in (0, 1)):
            known = "a weight is a number, 0 or more" if key == WEIGHT else "known are 0, 1, false and true"
            what = f"{place}: message {i + 1} ({message['role']}) has the {key} {value!r}; {known}."
            raise DataError(what, "Remove the key, or the row.")
    return min(found, key=lambda pair: (bool(pair[1]), pair[0] != WEIGHT), default=None)


def weights_of(talk: Talk) -> tuple[float, ...]:
    """Of each answer that is trained on, what the losses of its tokens are multiplied by."""
    flags = (flag_of(talk.messages[i], i, talk.place) for i in talk.answers)
    return tuple(float(flag[1]) if flag else 1.0 for flag in flags)


def weighed(talk: Talk, turns: Sequence[Turn]) -> list[Turn]:
    """The turns of the answers that are trained on, with their weights."""
    return [turn._replace(weight=weight) for turn, weight in zip(turns, weights_of(talk), strict=True)]


def trained(messages: Sequence[Message], place: str) -> tuple[int, ...]:
    """Which messages are trained on: those of the assistant that no key leaves out."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    flags = {i: flag_of(messages[i], i, place) or ("", 1) for i in answers}
    chosen = tuple(i for i in answers if flags[i][1])
    if not chosen:
        key, value = flags[answers[-1]]
        which = "the answer is" if len(answers) == 1 else "all answers are"
        what = f"{place}: {which} marked not to be trained on ({key} {value})."
        raise DataError(what, f"Remove the row, or the key {key!r} if the answer is to be trained on.")
    return chosen


def prefixes(talk: Talk, whole: str, render: Render, template: str) -> list[Turn]:
    """Where the answers stand, by rendering prefixes.

    Raises:
        DataError: the template does not only append at one of them, or refuses what stands before it.
    """
    found = []
    for i in talk.answers[:-1]:
        try:
            before, with_it = render(i, True), render(i + 1, False)
        except Exception as error:  # a template is somebody's program and raises what it likes
            said = " ".join(str(error).split())[:200] or type(error).__name__
            what = f"{talk.place}: {template} refuses the conversation up to {talk.name(i)} ({said})."
            raise DataError(what, f"So the tokens of that answer cannot be found. {ELSE}") from None
        if not with_it.startswith(before):
            raise DataError(_differs(talk, i, template, before, with_it, "with it"), ELSE)
        if not whole.startswith(with_it):
            raise DataError(_differs(talk, i, template, with_it, whole, "once the conversation goes on"), ELSE)
        found.append(Turn(len(before), len(with_it)))
    before = render(talk.cut, True)
    return [*found, Turn(len(before), len(whole))]


def _differs(talk: Talk, i: int, template: str, alone: str, other: str, when: str) -> str:
    same = next((n for n, (a, b) in enumerate(zip(alone, other, strict=False)) if a != b), len(other))
    start = max(0, same - 10)
    return (
        f"{talk.place}: {template} does not only append at {talk.name(i)}: "
        f"it writes {short(alone[start:])} up to there, and {short(other[start:])} {when}."
    )


def marks(talk: Talk, whole: str, tokenizer: Any) -> list[Turn] | None:
    """Where the template marks the answers that are trained on, with their weights; None for one without marks.

    Raises:
        DataError: an answer has no mark, or the marks do not tell which is whose.
    """
    template = tokenizer.get_chat_template(tools=talk.options.get("tools"))
    if not GENERATION.search(template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {**tokenizer.special_tokens_map, **talk.options}
    texts, marked = render_jinja_template(
        [talk.messages], chat_template=template, return_assistant_tokens_mask=True, **options
    )
    found = [Turn(*span) for span in marked[0] if span[1] > span[0]]
    answers = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
    owners = _owners(talk, answers, whole, found) if texts[0] == whole else None
    if owners is None:
        what = f"{talk.place}: the chat template marks {len(found)} stretches with {{% generation %}}, "
        raise DataError(what + f"and there are {len(answers)} answers.", MEND)
    bare = next((i for i in talk.answers if i not in owners), None)
    if bare is not None:
        what = f"{talk.place}: the chat template marks nothing of {talk.name(bare)} with {{% generation %}}."
        raise DataError(what, MEND)
    weights = dict(zip(talk.answers, weights_of(talk), strict=True))
    sides = zip(found, owners, strict=True)
    return [turn._replace(weight=weights[i]) for turn, i in sides if i in weights]


def _owners(talk: Talk, answers: Sequence[int], whole: str, found: Sequence[Turn]) -> list[int] | None:
    """Which answer each marked stretch is of: the last one whose text begins before the stretch ends.

    A template may mark what ends an answer apart, so as many stretches as answers may still be those of one answer.
    Where the texts do not stand there as they are, their number is all there is to go by; None where that differs.
    """
    texts = [_words(message) for message in talk.messages]
    alike = len(found) == len(answers)
    if alike and all(texts[i] in whole[turn.start : turn.end] for i, turn in zip(answers, found, strict=True)):
        return list(answers)
    starts, at = [], 0
    for i, text in enumerate(texts):  # all of them: an answer's words may stand in a question too
        place = whole.find(text, at) if text else -1
        if place < 0 and i in answers:
            return list(answers) if alike else None
        if i in answers:
            starts.append(place)
        at = max(at, place + len(text))
    return [answers[max(0, bisect_left(starts, turn.end) - 1)] for turn in found]


def _words(message: Message) -> str:
    text = message.get("content")
    return text.strip() if isinstance(text, str) else ""
