"""Messages of a row: checked, and in one form whatever form the file gives them."""

from __future__ import annotations

from typing import Any

from holdfast.data.jsontext import parsed
from holdfast.errors import DataError

Message = dict[str, Any]  # role, content, perhaps tool_calls, reasoning_content, name, ...
ROLES = ("system", "developer", "user", "assistant", "tool")
THINKING = ("reasoning_content", "thinking", "reasoning")  # transformers takes them for one
TEMPLATES_CURE = "Set data.prompt and data.completion to templates over the columns."


def messages_of(value: Any, place: str, column: str) -> list[Message]:
    """Check a message list, drop null keys, which parquet adds, and take a text out of a list of one part.

    Raises:
        DataError: no list of {role, content}, an unknown role, or content that is no text.
    """
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{place}: {column} is not a list of {{role, content}}.", TEMPLATES_CURE)
    return [_message(message, place, column) for message in value]


def _message(given: Message, place: str, column: str) -> Message:
    message = {key: item for key, item in given.items() if item is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{place}: {column} has the role {role!r}.", f"Known: {', '.join(ROLES)}.")
    if isinstance(content, list) and (text := _only_text(content)) is not None:
        message["content"] = content = text
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        what = f"{place}: {column} has a {role} message whose content is {kind_of(content)}."
        many = " Write the parts as one text." if isinstance(content, list) else ""
        raise DataError(what, f"Only text is supported.{many}")
    thoughts = {message[key] for key in THINKING if isinstance(message.get(key), str)}
    if len(thoughts) > 1:
        what = f"{place}: {column} has a {role} message with {' and '.join(k for k in THINKING if k in message)}."
        raise DataError(what, "They mean the same, and differ here: keep one.")
    return message


def _only_text(parts: list[Any]) -> str | None:
    """The text of [{"type": "text", "text": ...}]; None for several parts and other kinds."""
    if len(parts) != 1 or not isinstance(parts[0], dict):
        return None
    part = {key: value for key, value in parts[0].items() if value is not None}
    return part["text"] if set(part) == {"type", "text"} and isinstance(part["text"], str) else None


def kind_of(value: Any) -> str:
    """A value's kind in words, for messages."""
    kinds = {list: "a list", dict: "an object", str: "text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def from_text(value: Any, where: str) -> Any:
    """A column that may be given as JSON text, as may the items of its list."""
    if isinstance(value, str):
        return parsed(value, where) if value.strip() else None
    if isinstance(value, list):
        return [parsed(item, where) if isinstance(item, str) else item for item in value]
    return value


def without_nulls(value: Any) -> tuple[Any, bool]:
    if isinstance(value, list):
        pairs = [without_nulls(item) for item in value]
        return [item for item, _ in pairs], any(found for _, found in pairs)
    if isinstance(value, dict):
        kept = {key: without_nulls(item) for key, item in value.items() if item is not None}
        return {key: item for key, (item, _) in kept.items()}, len(kept) < len(value) or any(
            f for _, f in kept.values()
        )
    return value, False
