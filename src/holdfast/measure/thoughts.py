"""Thinking in a model's text: where it stands, and the switch for it in a chat template.

Public models put their thinking between a pair of marks before the answer, and many templates have a variable that
turns it on or off: `enable_thinking` (Qwen3, SmolLM3, GLM 4.5), `thinking` (DeepSeek V3.1, Granite), `reasoning`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from holdfast.data.fewshot import can_chat
from holdfast.data.rendered import Rendered

SWITCHES = ("enable_thinking", "thinking", "reasoning")
PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
OPENS = tuple(opens for opens, _ in PAIRS)
_MARK = re.compile("(" + "|".join(re.escape(mark) for pair in PAIRS for mark in pair) + ")")


@dataclass(frozen=True)
class Heard:
    """A text taken apart.

    thoughts: what stands between marks, without those of blanks alone; answer: what follows the last mark, "" inside
    a block that is still open; paired: every mark that opens is closed, and none closes what is not open.
    """

    thoughts: tuple[str, ...]
    answer: str
    paired: bool


def heard(output: str, prompt: str = "") -> Heard:
    """Take an output apart; a prompt that ends in an opening mark has begun the thinking already."""
    opened = next((mark for mark in OPENS if prompt.rstrip().endswith(mark)), "")
    thoughts: list[str] = []
    inside, paired, answer = False, True, ""
    for n, part in enumerate(_MARK.split(opened + output)):
        if n % 2:
            paired = paired and (part in OPENS) != inside
            inside, answer = part in OPENS, ""
        elif not inside:
            answer = part.strip()
        elif part.strip():
            thoughts.append(part.strip())
    return Heard(tuple(thoughts), answer, paired and not inside)


def switch_of(tokenizer: Any) -> str | None:
    """The variable of the chat template that decides on thinking: the prompt is another one when it is on.

    None where the template has none, or there is no template.
    """
    if not can_chat(tokenizer, shots=0):
        return None
    turns = [{"role": "user", "content": "zq"}]
    tried = ((name, [_tried(tokenizer, turns, name, value) for value in (True, False)]) for name in SWITCHES)
    return next((name for name, (on, off) in tried if on and off and on != off), None)


def _tried(tokenizer: Any, turns: list[dict[str, str]], name: str, value: bool) -> str:
    try:
        return rendered(tokenizer, turns, {name: value})
    except Exception:  # a template is somebody's program and raises what it likes
        return ""


def rendered(tokenizer: Any, turns: list[dict[str, str]], options: dict[str, Any]) -> Rendered:
    """`turns` through the chat template with some of its variables, up to where the answer begins."""
    return Rendered(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options))
