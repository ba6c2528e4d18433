"""One conversation on its way through a chat template, and what a template can tell its messages apart by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.data.messages import THINKING, Message

WEIGHT = "weight"  # of the losses of a message's tokens
FLAGS = (WEIGHT, "train", "training", "trainable", "loss")  # whether to train on a message, in usual trainers
SILENT = {"role", *FLAGS}  # what is not looked for in the text


@dataclass(frozen=True)
class Talk:
    """One conversation, up to its last answer.

    Attributes:
        answers: which messages are trained on; the last message is the last of them.
        place: file:line.
        options: what goes to the template beside the messages.
        each: the answers are looked for one by one, else what follows the prompt is the answer.
    """

    messages: list[Message]
    answers: tuple[int, ...]
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    each: bool = False

    @property
    def cut(self) -> int:
        """How many messages come before the last answer."""
        return self.answers[-1]

    def having(self, i: int, **keys: Any) -> Talk:
        """The same with other keys in message i; None removes a key."""
        changed = {key: value for key, value in {**self.messages[i], **keys}.items() if value is not None}
        return replace(self, messages=[*self.messages[:i], changed, *self.messages[i + 1 :]])

    def name(self, i: int) -> str:
        return f"message {i + 1} ({self.messages[i]['role']})"


def keys_of(message: Message) -> list[str]:
    """The keys that say something: filled, no marks for training, one of those for thinking."""
    keys = [key for key, value in message.items() if key not in SILENT and filled(value)]
    thoughts = [key for key in keys if key in THINKING] if len(keys) > 1 else []
    return [key for key in keys if key not in thoughts[1:]] if thoughts else keys


def filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def kinds_of(talk: Talk, told: list[list[str]]) -> Iterator[tuple]:
    """What a template can tell messages apart by, beside their text: position, neighbours, keys, options."""
    roles = ["", *(message["role"] for message in talk.messages), ""]
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=0) - 1  # the last question
    options = tuple(sorted(talk.options))
    for i, keys in enumerate(told):
        yield (*roles[i : i + 3], i in talk.answers, i == talk.cut, i > asked, tuple(keys), options)


def all_but(items: list[Any], k: int) -> list[Any]:
    return [*items[:k], *items[k + 1 :]]
