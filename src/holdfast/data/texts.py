"""Texts looked for in a rendered text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from holdfast.data.jsontext import sound
from holdfast.data.messages import TEMPLATES_CURE, Message

THINK = re.compile(r"(</?think>)")


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def stands(text: str, whole: str) -> bool:
    return text in whole or sound(text, "")[1:-1] in whole


def find(content: str, whole: str, at: int) -> tuple[str, int]:
    """How a content stands in the text behind `at`, and where it ends.

    "whole": all of it, blanks around it aside; "parts": all, blanks around the thinking aside; "rest": all but the
    thinking; "": not so.
    """
    text = content.strip()
    for form in (text, sound(text, "")[1:-1]) if whole.find(text, at) < 0 else (text,):
        if (start := whole.find(form, at)) >= 0:
            return "whole", start + len(form)
    if "</think>" not in text:
        return "", at
    parts = [part.strip() for part in THINK.split(text) if part.strip()]
    end = at
    for part in parts:
        start = whole.find(part, end)
        if start < 0:
            break
        end = start + len(part)
    else:
        return "parts", end
    rest = text.split("</think>")[-1].strip()
    start = whole.find(rest, at)
    return ("rest", start + len(rest)) if start >= 0 else ("", at)


def find_answer(message: Message, whole: str, at: int, prompt: str) -> tuple[str, int]:
    """The same for the answer, which stands behind the prompt; the prompt may have opened the thinking already."""
    content = message["content"]
    found = find(content, whole, max(at, len(prompt)))
    if found[0] not in ("whole", "parts") and content.lstrip().startswith("<think>"):
        again = find(content, whole, at)
        return again if again[0] in ("whole", "parts") else found
    return found


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def not_appending(place: str, prompt: str, whole: str) -> tuple[str, str]:
    same = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    start = max(0, same - 10)
    what = (
        f"{place}: the tokenizer's chat template renders the prompt differently with its answer: "
        f"{short(prompt[start:])} before the answer, {short(whole[start:])} with it."
    )
    return what, f"{TEMPLATES_CURE} Message data needs a template that only appends."
