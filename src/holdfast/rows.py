"""Task data as rows of prompt and completion, from local files, shipped files and the hub.

Nothing is guessed in silence: a row that does not fit is refused by file and line, and columns that could
mean two things are refused by name.
"""

import csv
import io
import json
import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from .errors import DataError, suggest
from .recipe import FILE_KINDS, SHIPPED, Source, locate, template_columns
from .rendered import Rendered

DATA_DIR = Path(__file__).parent / "data"  # behind holdfast:<file>
SCHEMAS = {  # what each schema needs; names as in TRL and LLaMA-Factory
    "prompt/completion": {"prompt", "completion"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
}
NOTES = {"id", "idx", "index", "source", "url", "meta", "metadata", "title", "date", "timestamp", "language"}
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHAREGPT |= {"system": "system", "tool": "tool"}
ROLES = ("system", "developer", "user", "assistant", "tool")
TEMPLATES_CURE = "Set data.prompt and data.completion to templates over the columns."

Record = tuple[str, dict[str, Any]]  # place (file:line) and columns
Message = dict[str, Any]  # role, content, perhaps tool_calls


@dataclass(frozen=True)
class Row:
    """One training or test example.

    Attributes:
        prompt: what the model sees; "" only for plain text data.
        completion: what it must say. A chat turn keeps the template's own end token and newline.
        source: name of the data set in a mix.
        where: file:line, or data set[split]:number for what has no lines.
    """

    prompt: str
    completion: str
    source: str = "task"
    where: str = ""


def read_rows(
    spec: str | Path | Mapping[str, Any] | Source,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    base_dir: str | Path,
    tokenizer: Any = None,
    source: str = "task",
) -> list[Row]:
    """Read one data set into rows, in file order.

    Args:
        spec: file, folder, hub id, holdfast:<shipped file>, or {path, name, split, revision}.
        prompt: template over the columns; None detects the schema from the columns.
        completion: the same; both or neither.
        base_dir: where relative paths are looked up first (then the working directory).
        tokenizer: renders chats with its chat template; needed for message data only.
        source: copied into every row.

    Raises:
        DataError: no such data, an empty set, or a row that does not fit; names file and line.
    """
    where_from = spec if isinstance(spec, Source) else Source.model_validate(spec)
    if (prompt is None) != (completion is None):
        raise DataError("One of prompt and completion is a template and the other is not.", "Give both.")
    records = list(_records(where_from, Path(base_dir)))
    if not records:
        raise DataError(f"{where_from.path}: holds no rows.", "Check the path and the split.")
    if prompt is None or completion is None:
        build = _detected(records[0], tokenizer)
    else:
        build = _templated(prompt, completion)
    return [Row(*_sound(build(columns, place), place), source, place) for place, columns in records]


def split(rows: Sequence[Row], size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Cut `size` rows (fraction below 1, else count) off by seed; both parts keep the order of `rows`.

    Rows with the same prompt and completion stay on one side, so the cut may be a little smaller than asked.
    """
    asked = int(size) if size >= 1 else max(1, round(size * len(rows))) if size > 0 else 0
    groups: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.prompt, row.completion), []).append(i)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    cut: set[int] = set()
    for group in order:
        if len(cut) + len(group) <= asked:
            cut.update(group)
    if asked and not 0 < len(cut) < len(rows):
        what = f"Cannot cut {asked} of {len(rows)} rows ({len(groups)} distinct) and leave rows on both sides."
        raise DataError(what, "Change data.validation_size, or give a validation file.")
    return [r for i, r in enumerate(rows) if i not in cut], [r for i, r in enumerate(rows) if i in cut]


def cap(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """Draw `count` rows by seed (None: all, in order). A smaller draw is the start of a larger one."""
    if count is None:
        return list(rows)
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order[:count]


def labels_of(rows: Sequence[Row], most: int = 50) -> tuple[str, ...] | None:
    """Return the distinct completions by first appearance, or None for a free-form task.

    A task has labels when there are at most `most` of them, each used three times on average (ours).
    """
    labels = tuple(dict.fromkeys(row.completion for row in rows))
    return labels if labels and len(labels) <= most and len(rows) >= 3 * len(labels) else None


def check_labels(train_labels: Sequence[str] | None, rows: Iterable[Row]) -> None:
    """Raise DataError for a completion that training never shows; None (free-form) checks nothing."""
    if train_labels is None:
        return
    known = set(train_labels)
    for row in rows:
        if row.completion not in known:
            what = f"{row.where}: the label {row.completion!r} does not occur in the training rows."
            near = suggest(row.completion, list(train_labels))
            listed = f"Known: {', '.join(map(repr, train_labels))}."
            raise DataError(what, f"{near} {listed}" if near.startswith("Did") else listed)


def leaks(train: Iterable[Row], test: Iterable[Row]) -> int:
    """Count the test rows whose prompt (for plain text: whose text) is also a training row's."""
    seen = {row.prompt or row.completion for row in train}
    return sum((row.prompt or row.completion) in seen for row in test)


# Reading: every reader yields (place, columns).


def _records(source: Source, base_dir: Path) -> Iterable[Record]:
    if source.path.startswith(SHIPPED):
        path: Path | None = _shipped(source.path.removeprefix(SHIPPED))
    else:
        path = locate(source.path, base_dir)
    if path is None or path.is_dir():
        return _from_hub(source, path, base_dir)
    for key in ("name", "split", "revision"):
        if getattr(source, key) is not None:
            what = f"{source.path} is one file, and {key} {getattr(source, key)!r} has no meaning for it."
            raise DataError(what, f"Remove {key}.")
    return _from_file(path)


def _shipped(name: str) -> Path:
    path = (DATA_DIR / name).resolve()
    if not path.is_file() or not path.is_relative_to(DATA_DIR.resolve()):
        files = (p for p in DATA_DIR.rglob("*") if p.suffix in FILE_KINDS)
        known = sorted(p.relative_to(DATA_DIR).as_posix() for p in files)
        raise DataError(f"{SHIPPED}{name} does not come with the package.", suggest(name, known))
    return path


def _from_file(path: Path) -> Iterator[Record]:
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(read_text(path), path.name, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".jsonl":
        return read_jsonl(read_text(path), path.name)
    if path.suffix == ".json":
        return _read_json(read_text(path), path.name)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    what = f"{path.name}: files of kind {path.suffix or '(no suffix)'} cannot be read."
    raise DataError(what, f"Use one of {', '.join(FILE_KINDS)}.")


def read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror}).", "Check its permissions.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: not UTF-8 text.", "Save the file as UTF-8.") from None


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {_kind(value)}, not an object.", "Write {'column': value, ...} in each row.")
    return place, value


def read_jsonl(text: str, name: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a string
        if line.strip():
            place = f"{name}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", "too deep") + f" at column {getattr(error, 'colno', 1)}"
                cure = "Each line must be one JSON object."
                raise DataError(f"{place}: not valid JSON ({problem}).", cure) from None
            yield _record(value, place)


def _read_json(text: str, name: str) -> Iterator[Record]:
    if not text.strip():
        return
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        problem, line = getattr(error, "msg", "too deep"), getattr(error, "lineno", 1)
        cure = "If each line is an object of its own, name the file .jsonl."
        raise DataError(f"{name}:{line}: not valid JSON ({problem}).", cure) from None
    breaks = [match.start() for match in re.finditer("\n", text)]
    for start, value in _items(text, _list_start(text, name)):
        yield _record(value, f"{name}:{bisect_right(breaks, start) + 1}")


# json gives no positions, so valid text is walked a second time, one value at a time.


def _skip(text: str, at: int, marks: str = "") -> int:
    while at < len(text) and (text[at] in " \t\r\n" or text[at] in marks):
        at += 1
    return at


def _items(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """Yield (offset, value) of the list that opens at `at`."""
    decoder = json.JSONDecoder()
    at = _skip(text, at + 1)
    while text[at] != "]":
        start = at
        value, at = decoder.raw_decode(text, at)
        yield start, value
        at = _skip(text, at, ",")


def _list_start(text: str, name: str) -> int:
    """Offset of the list of rows: the whole document, or the only list of a top-level object."""
    at = _skip(text, 0)
    if text[at] == "[":
        return at
    starts: dict[str, int] = {}
    if text[at] == "{":
        decoder = json.JSONDecoder()
        at = _skip(text, at + 1)
        while text[at] != "}":
            key, at = decoder.raw_decode(text, at)
            start = _skip(text, at, ":")
            value, at = decoder.raw_decode(text, start)
            at = _skip(text, at, ",")
            starts |= {key: start} if isinstance(value, list) else {}
    if len(starts) != 1:
        found = f"lists under {', '.join(starts)}" if starts else "no list"
        raise DataError(f"{name}:1: {found}, expected one list of rows.", "Keep one list of objects.")
    return next(iter(starts.values()))


def _read_csv(text: str, name: str, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or (header and not all(header)):
            raise DataError(f"{name}:1: a column name is empty or given twice.", "Name each column once.")
        first = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                what = f"{name}:{first}: {len(cells)} cells under {len(header)} columns."
                raise DataError(what, "Put quotes around a cell that holds the delimiter.")
            if cells:
                yield f"{name}:{first}", dict(zip(header, cells, strict=True))
            first = reader.line_num + 1
    except csv.Error as error:
        cure = "Check the quotes of that row."
        raise DataError(f"{name}:{reader.line_num}: not valid CSV ({error}).", cure) from None


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise DataError(f"{path.name}: not valid parquet ({problem}).", "Write the file again.") from None
    for number, value in enumerate(values, 1):
        yield f"{path.name}:{number}", value


def _from_hub(source: Source, folder: Path | None, base_dir: Path) -> Iterator[Record]:
    """A hub data set, or a local folder laid out like one."""
    path = source.path
    if folder is None and (path.endswith(FILE_KINDS) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)):
        beside = [p.name for p in (base_dir / path).parent.glob("*") if p.is_file()]
        near = suggest(Path(path).name, beside) if beside else ""
        what = f"{path}: no such file in {base_dir.absolute()} or {Path.cwd()}."
        raise DataError(what, near if near.startswith("Did") else "Check the path.")
    import datasets

    try:
        found = datasets.load_dataset(str(folder or path), source.name, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises a dozen unrelated types, httpx's among them
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "folder" if folder else "hub data set (and no local file)"
        cure = "Check the name, the split, the network and HF_TOKEN; or download it and give the file's path."
        raise DataError(f"{path}: the {kind} cannot be read ({problem}).", cure) from None
    if isinstance(found, dict) and len(found) != 1:
        what = f"{path}: has the splits {', '.join(map(str, found))}, and none is chosen."
        raise DataError(what, f"Write {{path: {path}, split: ...}}.")
    label, rows = next(iter(found.items())) if isinstance(found, dict) else (source.split, found)
    return ((f"{path}[{label}]:{number}", dict(row)) for number, row in enumerate(rows, 1))


# Building: every builder maps (columns, place) to (prompt, completion).

Build = Callable[[dict[str, Any], str], tuple[str, str]]


def _sound(pair: tuple[str, str], place: str) -> tuple[str, str]:
    """Refuse what no tokenizer or no loss can use."""
    for side in pair:
        try:
            side.encode()
        except UnicodeEncodeError as error:
            cure = "Write the character itself, or both halves of the escape."
            raise DataError(f"{place}: half a character ({side[error.start]!r}).", cure) from None
    if not pair[1].strip():
        raise DataError(f"{place}: the completion is empty.", "Remove the row or fill it in.")
    return pair


def _templated(prompt: str, completion: str) -> Build:
    def build(columns: dict[str, Any], place: str) -> tuple[str, str]:
        return _filled(prompt, columns, place, "prompt"), _filled(completion, columns, place, "completion")

    for template in (prompt, completion):
        template_columns(template)  # a broken template is refused before any row
    return build


def _filled(template: str, columns: dict[str, Any], place: str, side: str) -> str:
    """Fill a template; a side whose columns are all blank is empty, whatever the words around them."""
    names = template_columns(template)
    cells = {name: _cell(name, columns, place) for name in names}
    parts = Formatter().parse(template)  # not str.format: it takes a column named 0 for a position
    filled = "".join(literal + (cells[name] if name is not None else "") for literal, name, _, _ in parts)
    if not filled.strip() or (cells and not any(cell.strip() for cell in cells.values())):
        raise DataError(f"{place}: the {side} is empty.", "Remove the row or fill it in.")
    return filled


def _cell(name: str, columns: dict[str, Any], place: str) -> str:
    if name not in columns:
        listed = ", ".join(map(str, columns))
        what = f"{place}: no column {name!r}, which a template names; the row has {listed}."
        raise DataError(what, suggest(name, list(map(str, columns))))
    value = columns[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{place}: column {name!r} has no value.", "Remove the row or fill it in.")
    if not isinstance(value, str | int | float):
        what = f"{place}: column {name!r} holds {_kind(value)}, and a template takes text or a number."
        raise DataError(what, "Flatten the column, or leave the templates out for message data.")
    return str(value)


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _detected(first: Record, tokenizer: Any) -> Build:
    """Choose the builder by the columns of the first row."""
    place, columns = first
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
        raise DataError(what, f"{TEMPLATES_CURE} Known without templates: {known}.")
    (schema,) = fitting
    maker = {
        "prompt/completion": _prompt_completion,
        "messages": _chat,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "text": _text,
    }[schema]

    def build(row: dict[str, Any], at: str) -> tuple[str, str]:
        if missing := sorted(SCHEMAS[schema] - set(row)):
            what = f"{at}: no column {missing[0]!r}, which the first row ({place}) has."
            raise DataError(what, suggest(missing[0], list(map(str, row))))
        return maker(row, at, tokenizer)

    return build


def _is_flag(columns: dict[str, Any]) -> bool:
    """A true/false label beside prompt and completion is TRL's unpaired preference data."""
    return isinstance(columns.get("label"), bool)


def _string(row: dict[str, Any], name: str, place: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: column {name!r} holds {_kind(value)}, expected text.", TEMPLATES_CURE)
    if not value.strip():
        raise DataError(f"{place}: column {name!r} is empty.", "Remove the row or fill it in.")
    return value


def _text(row: dict[str, Any], place: str, tokenizer: Any) -> tuple[str, str]:
    return "", _string(row, "text", place)


def _prompt_completion(row: dict[str, Any], place: str, tokenizer: Any) -> tuple[str, str]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        head, tail = (_messages(row[name], place, name) for name in ("prompt", "completion"))
        return _rendered(head, tail, row, place, tokenizer)
    return _string(row, "prompt", place), _string(row, "completion", place)


def _chat(row: dict[str, Any], place: str, tokenizer: Any) -> tuple[str, str]:
    return _last_turn(_messages(row["messages"], place, "messages"), row, place, tokenizer)


def _sharegpt(row: dict[str, Any], place: str, tokenizer: Any) -> tuple[str, str]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and "from" in t for t in turns):
        raise DataError(f"{place}: conversations is not a list of {{from, value}}.", TEMPLATES_CURE)
    for turn in turns:
        if turn["from"] not in SHAREGPT:
            raise DataError(f"{place}: unknown speaker {turn['from']!r}.", f"Known: {', '.join(SHAREGPT)}.")
    renamed = [{"role": SHAREGPT[turn["from"]], "content": turn.get("value")} for turn in turns]
    return _last_turn(_messages(renamed, place, "conversations"), row, place, tokenizer)


def _alpaca(row: dict[str, Any], place: str, tokenizer: Any) -> tuple[str, str]:
    """A chat turn where the tokenizer has a chat template, else the Alpaca headings (Taori et al. 2023)."""
    ask, answer, given = (
        _string(row, "instruction", place),
        _string(row, "output", place),
        row.get("input") or "",
    )
    if not isinstance(given, str):
        raise DataError(f"{place}: column 'input' holds {_kind(given)}, expected text.", TEMPLATES_CURE)
    extra = [name for name in ("system", "history") if row.get(name)]
    if extra:
        what = f"{place}: alpaca column {extra[0]!r} is filled, and it is not read."
        raise DataError(what, "Turn the rows into messages with roles.")
    if getattr(tokenizer, "chat_template", None):
        turn = {"role": "user", "content": f"{ask}\n{given}" if given else ask}
        return _rendered([turn], [{"role": "assistant", "content": answer}], row, place, tokenizer)
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{ask}\n\n{middle}### Response:\n", answer


def _messages(value: Any, place: str, column: str) -> list[Message]:
    """Check a message list and drop null keys, which parquet adds."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{place}: {column} is not a list of {{role, content}}.", TEMPLATES_CURE)
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{place}: {column} has the role {role!r}.", f"Known: {', '.join(ROLES)}.")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            what = f"{place}: {column} has a {role} message whose content is {_kind(message.get('content'))}."
            raise DataError(what, "Only text is supported.")
    return messages


def _last_turn(messages: list[Message], row: dict[str, Any], place: str, tokenizer: Any) -> tuple[str, str]:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        what = f"{place}: the messages do not end with an answer of the assistant to someone."
        raise DataError(what, "Cut the row after the assistant's last message, or remove it.")
    return _rendered(messages[:-1], messages[-1:], row, place, tokenizer)


def _rendered(
    head: list[Message], tail: list[Message], row: dict[str, Any], place: str, tokenizer: Any
) -> tuple[str, str]:
    """Render with the chat template, so that prompt + completion is exactly the whole conversation."""
    if not getattr(tokenizer, "chat_template", None):
        what = f"{place}: chat data, and the tokenizer has no chat template."
        raise DataError(what, f"Use a model with a chat template. Or: {TEMPLATES_CURE}")
    from jinja2 import TemplateError

    options: dict[str, Any] = {"tokenize": False, "tools": row.get("tools") or None}
    try:
        prompt = tokenizer.apply_chat_template(head, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(head + tail, add_generation_prompt=False, **options)
    except (TemplateError, ValueError, TypeError) as error:
        what = f"{place}: the tokenizer's chat template refuses the row ({error})."
        raise DataError(what, "Check the order of the roles.") from None
    if not whole.startswith(prompt):
        what = f"{place}: the tokenizer's chat template renders the prompt differently with its answer."
        raise DataError(what, f"{TEMPLATES_CURE} Message data needs a template that only appends.")
    return Rendered(prompt), whole[len(prompt) :]
