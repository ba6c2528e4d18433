"""Records into pairs of prompt and completion: by templates over the columns, or by the schema that the columns show.

Every builder maps (columns, place) to (prompt, completion). Columns that could mean two things are refused by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any
from unicodedata import category

from holdfast.data.chat import OPTIONS, Chat
from holdfast.data.jsontext import Written
from holdfast.data.messages import TEMPLATES_CURE, Message, kind_of, messages_of
from holdfast.data.notes import BOOKKEEPING as NOTES
from holdfast.data.notes import Notes
from holdfast.data.readers import ClassNumber, Record
from holdfast.data.rendered import Pair
from holdfast.errors import DataError, suggest
from holdfast.recipe import template_columns

SCHEMAS = {  # what each schema needs; names as in TRL and LLaMA-Factory
    "prompt/completion": {"prompt", "completion"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
}
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHAREGPT |= {"system": "system", "tool": "tool"}
CARRIERS = {*OPTIONS, "functions", "function_call", "system", "history", "images", "image", "videos", "video"}
CARRIERS |= {"audios", "audio", "reasoning_content", "reasoning", "thinking", "weight", "train", "chosen", "rejected"}

PLAIN_CURE = "To train on the text alone: data.prompt: '' and data.completion: '{text}'."
Build = Callable[[dict[str, Any], str], Pair]


def sound(pair: Pair, place: str, notes: Notes) -> Pair:
    """Refuse what no tokenizer or no loss can use."""
    for side in pair[:2]:
        try:
            side.encode()
        except UnicodeEncodeError as error:
            cure = "Write the character itself, or both halves of the escape."
            raise DataError(f"{place}: half a character ({side[error.start]!r}).", cure) from None
        if "\0" in side:
            raise DataError(
                f"{place}: a NUL character.", "Remove it; a file full of them is UTF-16: save it as UTF-8."
            )
        if "\ufffd" in side:
            notes.add("{n text} with U+FFFD, which stands for a letter that was lost in a conversion", place)
    if all(char.isspace() or category(char) in ("Cc", "Cf") for char in pair[1]):
        seen = f" but for {pair[1].strip()!a}, which nobody sees" if pair[1].strip() else ""
        raise DataError(f"{place}: the completion is empty{seen}.", "Remove the row or fill it in.")
    if "\r" in pair[1]:
        notes.add("{n answer} with a carriage return (a line break of Windows), trained on as it stands", place)
    return pair


def templated(prompt: str, completion: str, notes: Notes) -> Build:
    """An empty prompt makes the completion plain text, as a column `text` is."""

    def build(columns: dict[str, Any], place: str) -> Pair:
        return Pair(
            _filled(prompt, columns, place, "prompt", notes) if prompt else "",
            _filled(completion, columns, place, "completion", notes),
        )

    for template in (prompt, completion):
        template_columns(template)  # a broken template is refused before any row
    return build


def _filled(template: str, columns: dict[str, Any], place: str, side: str, notes: Notes) -> str:
    """Fill a template; a side whose columns are all blank is empty, whatever the words around them."""
    names = template_columns(template)
    cells = {name: _cell(name, columns, place, notes) for name in names}
    parts = Formatter().parse(template)  # not str.format: it takes a column named 0 for a position
    filled = "".join(literal + (cells[name] if name is not None else "") for literal, name, _, _ in parts)
    if not filled.strip() or (cells and not any(cell.strip() for cell in cells.values())):
        raise DataError(f"{place}: the {side} is empty.", "Remove the row or fill it in.")
    return filled


def _cell(name: str, columns: dict[str, Any], place: str, notes: Notes) -> str:
    """A column as text: numbers, true and false as JSON writes them, and in the file's own spelling."""
    if name not in columns:
        listed = ", ".join(map(str, columns))
        what = f"{place}: no column {name!r}, which a template names; the row has {listed}."
        raise DataError(what, _near(name, columns))
    value = columns[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{place}: column {name!r} has no value.", "Remove the row or fill it in.")
    if not isinstance(value, str | int | float):
        what = f"{place}: column {name!r} holds {kind_of(value)}, and a template takes text or a number."
        raise DataError(what, "Flatten the column, or leave the templates out for message data.")
    if isinstance(value, str):
        return value
    if isinstance(value, ClassNumber):
        what = f"column {name!r} holds class numbers, and the names of the classes are written ({{n time}})"
        notes.add(what, place, f"{int(value)} is {value.name!r}")
        return value.name
    if isinstance(value, bool):
        text = "true" if value else "false"
        notes.add(f"column {name!r} holds true or false, written so, in small letters ({{n time}})", place)
        return text
    if isinstance(value, float) and math.isinf(value):
        what = f"{place}: column {name!r} holds {value}, which is not a finite number."
        raise DataError(what, "Write a finite number, or the word in quotes.")
    if isinstance(value, float) and not isinstance(value, Written):
        notes.add(f"column {name!r} holds binary numbers, written in Python's way ({{n time}})", place, str(value))
    return str(value)


def _near(name: str, columns: Mapping[Any, Any]) -> str:
    """The cure for a missing column; blanks around a name are hard to see."""
    for known in map(str, columns):
        if known.strip() == name.strip() and known != name:
            return f"The column is called {known!r}, with its blanks: rename it."
    return suggest(name, list(map(str, columns)))


def detected(first: Record, chat: Chat, notes: Notes) -> Build:
    """Choose the builder by the columns of the first row."""
    place, columns = first
    schema = _schema(place, columns)
    need = SCHEMAS[schema]
    maker = {
        "prompt/completion": _prompt_completion,
        "messages": _chat,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "text": _text,
    }[schema]
    optional = {"input"} if schema == "alpaca" else set()

    def build(row: dict[str, Any], at: str) -> Pair:
        if missing := sorted(need - set(row)):
            what = f"{at}: no column {missing[0]!r}, which the first row ({place}) has."
            raise DataError(what, _near(missing[0], row))
        pair = maker(row, at, chat)
        if others := [name for name in row if name not in need and name not in optional]:
            _unread(others, row, at, _is_chat(schema, row, chat), notes)
        return pair

    return build


def schema_of(place: str, columns: dict[str, Any]) -> str | None:
    """The schema that the columns of a row show, or None where templates are needed.

    Raises:
        DataError: preference data, which no template makes supervised.
    """
    if {"chosen", "rejected"} <= set(columns) or any(need <= set(columns) for need in SCHEMAS.values()):
        try:
            return _schema(place, columns)
        except DataError as error:
            if "preference data" in error.what:
                raise
    return None


def _schema(place: str, columns: dict[str, Any]) -> str:
    names = set(columns)
    if {"chosen", "rejected"} <= names or (SCHEMAS["prompt/completion"] <= names and _is_flag(columns)):
        cure = "Write a file with prompt and completion (the chosen answer); preference tuning is TRL's DPO."
        raise DataError(f"{place}: preference data ({', '.join(columns)}), and this is supervised.", cure)
    fitting = [name for name, need in SCHEMAS.items() if need <= names]
    if fitting == ["text"] and names - {"text"} - NOTES:
        fitting = []  # text beside a label column: training on the text alone would be a silent mistake
    if len(fitting) != 1:
        what = f"{place}: the columns {', '.join(map(str, columns))} fit {' and '.join(fitting) or 'no schema'}."
        known = "; ".join(f"{name} ({', '.join(sorted(need))})" for name, need in SCHEMAS.items())
        plain = f" {PLAIN_CURE}" if "text" in names else ""
        raise DataError(what, f"{TEMPLATES_CURE}{plain} Known without templates: {known}.")
    return fitting[0]


def _is_chat(schema: str, row: dict[str, Any], chat: Chat) -> bool:
    """Whether a row went through the chat template, and its tools, documents and system text with it."""
    if schema == "alpaca":
        return chat.has_template
    return schema in ("messages", "sharegpt") or isinstance(row.get("prompt"), list)


def _unread(names: Sequence[str], row: dict[str, Any], place: str, is_chat: bool, notes: Notes) -> None:
    """Refuse a column that would change what is trained; name once what is merely not used."""
    for name in names:
        value = row[name]
        if value is None or value in ("", [], {}) or (is_chat and name in (*OPTIONS, "system")):
            continue
        if name in ("weight", "train") and value == 1:
            continue
        if name in CARRIERS:
            what = f"{place}: column {name!r} is filled, and it is not read."
            raise DataError(what, f"Remove the column, or put it into the messages or the prompt. {TEMPLATES_CURE}")
        notes.add(f"column {name!r} is not used ({{n row}})", place)


def _is_flag(columns: dict[str, Any]) -> bool:
    """A true/false label beside prompt and completion is TRL's unpaired preference data."""
    return isinstance(columns.get("label"), bool)


def _string(row: dict[str, Any], name: str, place: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: column {name!r} holds {kind_of(value)}, expected text.", TEMPLATES_CURE)
    if not value.strip():
        raise DataError(f"{place}: column {name!r} is empty.", "Remove the row or fill it in.")
    return value


def _text(row: dict[str, Any], place: str, chat: Chat) -> Pair:
    return Pair("", _string(row, "text", place))


def _prompt_completion(row: dict[str, Any], place: str, chat: Chat) -> Pair:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        head, tail = (messages_of(row[name], place, name) for name in ("prompt", "completion"))
        return chat.pair(_with_system(head, row, place), tail, row, place)
    return Pair(_string(row, "prompt", place), _string(row, "completion", place))


def _chat(row: dict[str, Any], place: str, chat: Chat) -> Pair:
    return _conversation(messages_of(row["messages"], place, "messages"), row, place, chat)


def _sharegpt(row: dict[str, Any], place: str, chat: Chat) -> Pair:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and "from" in t for t in turns):
        raise DataError(f"{place}: conversations is not a list of {{from, value}}.", TEMPLATES_CURE)
    for turn in turns:
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT:
            raise DataError(f"{place}: unknown speaker {turn['from']!r}.", f"Known: {', '.join(SHAREGPT)}.")
    return _conversation(messages_of([_turn(t) for t in turns], place, "conversations"), row, place, chat)


def _turn(turn: dict[str, Any]) -> Message:
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": SHAREGPT[turn["from"]], "content": turn.get("value")}


def _alpaca(row: dict[str, Any], place: str, chat: Chat) -> Pair:
    """A chat turn where the tokenizer has a chat template, else the Alpaca headings (Taori et al. 2023)."""
    ask, answer, given = (
        _string(row, "instruction", place),
        _string(row, "output", place),
        row.get("input") or "",
    )
    if not isinstance(given, str):
        raise DataError(f"{place}: column 'input' holds {kind_of(given)}, expected text.", TEMPLATES_CURE)
    given = given if given.strip() else ""
    extra = [name for name in ("system", "history") if row.get(name)]
    if extra:
        what = f"{place}: alpaca column {extra[0]!r} is filled, and it is not read."
        raise DataError(what, "Turn the rows into messages with roles.")
    if chat.has_template:
        turn = {"role": "user", "content": f"{ask}\n{given}" if given else ask}
        return chat.pair([turn], [{"role": "assistant", "content": answer}], row, place)
    middle = f"### Input:\n{given}\n\n" if given else ""
    return Pair(f"### Instruction:\n{ask}\n\n{middle}### Response:\n", answer)


def _conversation(messages: list[Message], row: dict[str, Any], place: str, chat: Chat) -> Pair:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        what = f"{place}: the messages do not end with an answer of the assistant to someone."
        raise DataError(what, "Cut the row after the assistant's last message, or remove it.")
    return chat.conversation(_with_system(messages, row, place), row, place)


def _with_system(messages: list[Message], row: dict[str, Any], place: str) -> list[Message]:
    """Put the text of a column `system` in front, as its own message."""
    text = row.get("system")
    if text is None or text == "":
        return messages
    if not isinstance(text, str):
        raise DataError(f"{place}: column 'system' holds {kind_of(text)}, expected text.", TEMPLATES_CURE)
    if messages[0]["role"] == "system":
        raise DataError(f"{place}: a column 'system' and a message of the system.", "Keep one of the two.")
    return [{"role": "system", "content": text}, *messages]
