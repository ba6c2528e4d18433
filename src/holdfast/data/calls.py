"""Tool calls: their parts, their two spellings (objects and JSON text), and other calls to compare them with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from holdfast.data.jsontext import parsed, sound
from holdfast.data.talk import Talk, all_but
from holdfast.errors import DataError

MARK = "zqx"  # put into a text to see whether that changes what is rendered


def functions(calls: list[Any]) -> Iterator[dict[str, Any]]:
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict):
            yield function


def told_by(key: str, value: Any) -> Any:
    """What of a key must stand in the text: of tool calls the names and arguments."""
    return [[f.get("name"), f.get("arguments")] for f in functions(value)] if key == "tool_calls" else value


def other_calls(calls: list[Any]) -> Iterator[list[Any]]:
    """The calls without one of them, with another name, and with other arguments."""
    for k, call in enumerate(calls):
        yield all_but(calls, k)
        function = call.get("function", call)
        if not isinstance(function, dict):
            continue
        for changed in ({"name": f"{function.get('name')}{MARK}"}, {"arguments": marked(function.get("arguments"))}):
            inner = {**function, **changed}
            yield [*calls[:k], {**call, "function": inner} if "function" in call else inner, *calls[k + 1 :]]


def marked(value: Any) -> Any:
    return {**value, MARK: MARK} if isinstance(value, dict) else f"{value or ''}{MARK}"


def arguments(talk: Talk, kind: type) -> list[Any]:
    calls = [call for m in talk.messages for call in m.get("tool_calls", ())]
    return [f["arguments"] for f in functions(calls) if isinstance(f.get("arguments"), kind)]


def respelled(talk: Talk, spell: Any, kind: type) -> Talk:
    """The same conversation with the arguments of that kind in another form."""

    def other(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), kind):
            return call
        inner = {**function, "arguments": spell(function["arguments"])}
        return {**call, "function": inner} if "function" in call else inner

    messages = [
        {**m, "tool_calls": [other(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m
        for m in talk.messages
    ]
    return replace(talk, messages=messages)


def in_json(kind: type, place: str) -> Any:
    """How arguments of that kind are written in the other form."""
    return (lambda value: sound(value, place)) if kind is dict else (lambda text: parsed(text, place))


def check_link(talk: Talk, i: int) -> None:
    """Where the ids of calls are not written, only the order says which call a tool answers."""
    first = i
    while first and talk.messages[first - 1]["role"] == "tool":
        first -= 1
    calls = talk.messages[first - 1].get("tool_calls", []) if first else []
    ids = [call.get("id") for call in calls]
    own = talk.messages[i].get("tool_call_id")
    if own in ids and ids.index(own) != i - first:
        what = f"{talk.place}: {talk.name(i)} answers call {own!r} out of turn, and the chat template writes no ids."
        raise DataError(what, "Put the answers of the tools in the order of the calls.")
