"""Calls of functions in a model's answer, in the ways in which public models write them.

    between marks   <tool_call>...</tool_call> (Hermes, Qwen, SmolLM3), <|tool_call|> (Granite, Phi-4-mini),
                    <|tool_call_start|> (LFM2), [TOOL_CALLS] (Mistral), <|python_tag|> (Llama 3), <|START_ACTION|>
                    (Cohere), a fence named tool_call or tool_code; what stands around them is prose
    bare            the answer, or the fence that is all of it, begins with the call itself

The call is JSON (a name, and "arguments" or "parameters"; one object or several), Python (`name(key=value)` or a list
of such calls), name{"key": value}, or <function=name> with JSON or <parameter=key> tags in it. Marks may be special
tokens, so they must be left in the text. Other ways (DeepSeek, GLM, gpt-oss) are not read.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.measure.thoughts import heard
from holdfast.measure.verify import reply

Schemas = Mapping[str, Mapping[str, Any]]  # name of an offered function: the JSON schema of its parameters

_MARKS = (
    (r"<tool_call>", r"</tool_call>"),
    (r"<\|tool_call\|>", r"<\|/tool_call\|>"),
    (r"<\|tool_call_start\|>", r"<\|tool_call_end\|>"),
    (r"<\|START_ACTION\|>", r"<\|END_ACTION\|>"),
    (r"```tool_(?:call|code)\b", r"```"),
    (r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])"),
    (r"<\|python_tag\|>", r"(?=<\|python_tag\|>)"),
    (r"(?=<function=)", r"(?<=</function>)"),
)
_MARKED = re.compile("|".join(rf"{opens}(.*?)(?:{closes}|\Z)" for opens, closes in _MARKS), re.DOTALL)
_BROKEN = re.compile(r'\[?\s*\{\s*"(?:name|type|function|tool_name)"\s*:.*"(?:arguments|parameters)"', re.DOTALL)
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)
_TAG = re.compile(r"<function=([\w.-]+)>(.*?)</function>", re.DOTALL)
_FIELD = re.compile(r"<parameter=([\w.-]+)>(.*?)</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One call of a function."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Calling:
    """What an answer calls. `tried`: it calls, or begins to in a way that cannot be read (then there are no calls)."""

    calls: tuple[Call, ...]
    tried: bool


def read_calls(output: str, schemas: Schemas) -> Calling:
    """The calls in an output, thinking left out; unreadable beside readable ones, there are none."""
    text = heard(output).answer
    if found := [next((g for g in m.groups() if g is not None), "") for m in _MARKED.finditer(text)]:
        parts = [_read(part, schemas) for part in found]
        whole = all(parts)
        return Calling(tuple(c for part in parts for c in part) if whole else (), True)
    body = reply(text)
    names = "|".join(map(re.escape, schemas))
    if body.startswith(("{", "[{", "[ {")):
        calls = _of_json(body)
        return Calling(tuple(calls), bool(calls) or _BROKEN.match(body) is not None)
    if re.match(rf"\[?\s*(?:{names})\s*[({{]", body):
        return Calling(tuple(_read(body, schemas)), True)
    return Calling((), False)


def name_ends(output: str) -> int | None:
    """Where the name of the first called function ends, in characters; None where an output calls nothing.

    No function is known here, so a call in Python without marks must be all of the answer.
    """
    text = heard(output).answer
    alone = re.fullmatch(r"\[?\s*[\w.-]+\s*[({].*[)}]\s*\]?", text, re.DOTALL)
    calls = read_calls(output, {}).calls or tuple(_read(text, {}) if alone else ())
    if not calls:
        return None
    mark, name = _MARKED.search(text), re.escape(calls[0].name)
    begin = output.rfind(text) + (mark.start() if mark else 0)
    key = r'"(?:name|tool_name|function)"\s*:\s*"'
    found = re.search(f"{key}{name}", output[begin:]) or re.search(name, output[begin:])
    return begin + found.end() if found else None


def _read(text: str, schemas: Schemas) -> list[Call]:
    """The calls that a text consists of; none where it cannot be read."""
    body = reply(text)
    if "<function=" in body:
        return _of_tags(body, schemas)
    if calls := _of_json(body):
        return calls
    if named := _NAMED.fullmatch(body):
        arguments = _arguments(named[2])
        return [] if arguments is None else [Call(named[1], arguments)]
    return _of_python(body)


def _of_json(text: str) -> list[Call]:
    """The calls at the beginning of a text, one after another; what follows them is prose."""
    decoder, calls, at = json.JSONDecoder(), [], 0
    while at < len(text) and text[at] in "{[":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        some = [_of_object(one) for one in (value if isinstance(value, list) else [value])]
        if None in some:
            break
        calls += some
        at = end + len(text[end:]) - len(text[end:].lstrip(" \n\t;,"))
    return calls


def _of_object(value: Any) -> Call | None:
    inner = value.get("function", value) if isinstance(value, dict) else None
    if isinstance(inner, str) and isinstance(value, dict):  # {"function": "name", "arguments": {...}}
        inner = {"name": inner, **value}
    if not isinstance(inner, dict):
        return None
    name = inner.get("name", inner.get("tool_name"))
    arguments = _arguments(inner.get("arguments", inner.get("parameters")))
    return Call(name, arguments) if isinstance(name, str) and arguments is not None else None


def _arguments(value: Any) -> dict[str, Any] | None:
    """An object, which may stand there as JSON text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _of_python(text: str) -> list[Call]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            body = ast.parse(text, mode="eval").body
        calls = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
        return [_of_node(call) for call in calls]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _of_node(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("no call with named arguments")
    return Call(ast.unparse(node.func), {str(k.arg): ast.literal_eval(k.value) for k in node.keywords})


def _of_tags(text: str, schemas: Schemas) -> list[Call]:
    calls = []
    for name, inside in _TAG.findall(text):
        known = schemas.get(name, {}).get("properties", {})
        fields = {key: _typed(value.strip(), known.get(key, {})) for key, value in _FIELD.findall(inside)}
        arguments = fields if "<parameter=" in inside else _arguments(inside.strip() or "{}")
        if arguments is None:
            return []
        calls.append(Call(name, arguments))
    return calls


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """Tags hold text, whatever the type of the parameter."""
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False}.get(text, text)


def same_arguments(given: Mapping[str, Any], wanted: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Whether `given` are the arguments `wanted`; an optional one may be left out, null, or its default."""
    known = schema.get("properties", {})
    filled = {key: value for key, value in given.items() if value is not None}
    for key in filled.keys() - wanted.keys():
        if "default" not in known.get(key, {}) or not _same(filled[key], known[key]["default"], known[key]):
            return False
    return all(key in filled and _same(filled[key], value, known[key]) for key, value in wanted.items())


def _same(given: Any, wanted: Any, schema: Mapping[str, Any]) -> bool:
    """Of one type and equal. Free text may differ in case, blanks and a full stop; 3.0 is the number 3."""
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(wanted, int | float):
        return isinstance(given, int | float) and given == wanted
    if isinstance(wanted, str):
        alike = "enum" not in schema and isinstance(given, str) and _plain(given) == _plain(wanted)
        return given == wanted or alike
    if isinstance(wanted, list):
        some = isinstance(given, list | tuple) and len(given) == len(wanted)
        return some and all(_same(a, b, schema.get("items", {})) for a, b in zip(given, wanted, strict=True))
    return isinstance(given, dict) and same_arguments(given, wanted, schema)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
