"""Task data as rows of prompt and completion, from local files, shipped files and the hub.

Nothing is guessed in silence: a row that does not fit is refused by file and line, and columns that could
mean two things are refused by name.
"""

import codecs
import csv
import io
import json
import math
import random
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any
from unicodedata import category

from holdfast.data.chat import LAST_ONLY, OPTIONS, TEMPLATES_CURE, Chat, Message, kind_of, messages_of
from holdfast.data.jsontext import DECODER, SYNTAX, Bent, Written
from holdfast.data.notes import BOOKKEEPING as NOTES
from holdfast.data.notes import Notes
from holdfast.errors import DataError, pip_install, suggest
from holdfast.recipe import FILE_KINDS, SHIPPED, Source, locate, template_columns

DATA_DIR = Path(__file__).parent / "shipped"  # behind holdfast:<file>
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

Record = tuple[str, dict[str, Any]]  # place (file:line) and columns


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
    notes: list[str] | None = None,
) -> list[Row]:
    """Read one data set into rows, in file order.

    Args:
        spec: file, folder, hub id, holdfast:<shipped file>, or {path, name, split, revision}.
        prompt: template over the columns; None detects the schema from the columns.
        completion: the same; both or neither.
        base_dir: where relative paths are looked up first (then the working directory).
        tokenizer: renders chats with its chat template; needed for message data only.
        source: copied into every row.
        notes: what is no error and must be said is added here, one sentence each with its count; None warns.

    Raises:
        DataError: no such data, an empty set, or a row that does not fit; names file and line.
    """
    where_from = spec if isinstance(spec, Source) else Source.model_validate(spec)
    if (prompt is None) != (completion is None):
        raise DataError("One of prompt and completion is a template and the other is not.", "Give both.")
    found, arrow = _records(where_from, Path(base_dir))
    records, said = list(found), Notes()
    if not records:
        raise DataError(f"{where_from.path}: holds no rows.", "Check the path and the split.")
    if prompt is None or completion is None:
        build = _detected(records[0], Chat(tokenizer, said, arrow), said)
    else:
        build = _templated(prompt, completion, said)
    rows = [Row(*_sound(build(columns, place), place, said), source, place) for place, columns in records]
    if notes is not None:
        notes += said.lines()
    elif lines := said.lines():
        warnings.warn(f"{where_from.path}: {'; '.join(lines)}", stacklevel=2)
    return rows


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


def _records(source: Source, base_dir: Path) -> tuple[Iterable[Record], bool]:
    """The rows, and whether they come from a table, which fills missing keys with null."""
    if source.path.startswith(SHIPPED):
        path: Path | None = _shipped(source.path.removeprefix(SHIPPED))
    else:
        path = locate(source.path, base_dir)
    if path is None or path.is_dir():
        return _from_hub(source, path, base_dir), True
    for key in ("name", "split", "revision"):
        if getattr(source, key) is not None:
            what = f"{source.path} is one file, and {key} {getattr(source, key)!r} has no meaning for it."
            raise DataError(what, f"Remove {key}.")
    return _from_file(path), path.suffix == ".parquet"


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
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path.name}:1: UTF-16 text, not UTF-8.", "Save the file as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: not UTF-8 text.", "Save the file as UTF-8.") from None


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {kind_of(value)}, not an object.", "Write {'column': value, ...} in each row.")
    return place, value


def read_jsonl(text: str, name: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a string
        if line.strip():
            place = f"{name}:{number}"
            try:
                value = DECODER.decode(line)
            except Bent as error:
                raise error.at(place) from None
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", "too deep") + f" at column {getattr(error, 'colno', 1)}"
                cure = "Each line must be one JSON object."
                raise DataError(f"{place}: not valid JSON ({problem}).", cure) from None
            yield _record(value, place)


def _read_json(text: str, name: str) -> Iterator[Record]:
    if not text.strip():
        return
    try:
        SYNTAX.decode(text)
    except (ValueError, RecursionError) as error:
        problem, line = getattr(error, "msg", "too deep"), getattr(error, "lineno", 1)
        cure = "If each line is an object of its own, name the file .jsonl."
        raise DataError(f"{name}:{line}: not valid JSON ({problem}).", cure) from None
    breaks = [match.start() for match in re.finditer("\n", text)]

    def place(start: int) -> str:
        return f"{name}:{bisect_right(breaks, start) + 1}"

    for start, value in _items(text, _list_start(text, name), place):
        yield _record(value, place(start))


# json gives no positions, so valid text is walked a second time, one value at a time.


def _skip(text: str, at: int, marks: str = "") -> int:
    while at < len(text) and (text[at] in " \t\r\n" or text[at] in marks):
        at += 1
    return at


def _items(text: str, at: int, place: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
    """Yield (offset, value) of the list that opens at `at`."""
    at = _skip(text, at + 1)
    while text[at] != "]":
        start = at
        try:
            value, at = DECODER.raw_decode(text, at)
        except Bent as error:
            raise error.at(place(start)) from None
        yield start, value
        at = _skip(text, at, ",")


def _list_start(text: str, name: str) -> int:
    """Offset of the list of rows: the whole document, or the only list of a top-level object."""
    at = _skip(text, 0)
    if text[at] == "[":
        return at
    starts: dict[str, int] = {}
    if text[at] == "{":
        at = _skip(text, at + 1)
        while text[at] != "}":
            key, at = SYNTAX.raw_decode(text, at)
            if key in starts:
                raise DataError(f"{name}:1: the key {key!r} is given twice in one object.", "Keep one of the two.")
            start = _skip(text, at, ":")
            value, at = SYNTAX.raw_decode(text, start)
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
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        what = f"{path.name}: reading parquet needs pyarrow, which cannot be imported ({error})."
        raise DataError(what, f"Run: {pip_install('datasets')}, or write the file as jsonl.") from error
    try:
        table = parquet.read_table(path)
        values = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise DataError(f"{path.name}: not valid parquet ({problem}).", "Write the file again.") from None
    classes = _classes(_recorded(table))
    for number, value in enumerate(values, 1):
        place = f"{path.name}:{number}"
        yield place, _named(value, classes, place)


def _from_hub(source: Source, folder: Path | None, base_dir: Path) -> Iterator[Record]:
    """A hub data set, or a local folder laid out like one."""
    path = source.path
    if folder is None and (path.endswith(FILE_KINDS) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)):
        beside = [p.name for p in (base_dir / path).parent.glob("*") if p.is_file()]
        near = suggest(Path(path).name, beside) if beside else ""
        what = f"{path}: no such file in {base_dir.absolute()} or {Path.cwd()}."
        raise DataError(what, near if near.startswith("Did") else "Check the path.")
    try:
        import datasets
    except ImportError as error:
        need = "a folder is read" if folder else "no local file has this name, and hub data sets are read"
        what = f"{path}: {need} by the package datasets, which cannot be imported ({error})."
        raise DataError(what, f"Run: {pip_install('datasets')}, or give a jsonl, json or csv file.") from error
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
    classes = _classes(getattr(rows, "features", None))
    places = ((f"{path}[{label}]:{number}", dict(row)) for number, row in enumerate(rows, 1))
    return ((place, _named(row, classes, place)) for place, row in places)


class ClassNumber(int):
    """A class of a table by its number; a template writes its name."""

    name: str


def _named(row: dict[str, Any], classes: Mapping[str, Sequence[str]], place: str) -> dict[str, Any]:
    """The row, with the classes of the table in place of their numbers."""
    for column, names in classes.items():
        number = row.get(column)
        if isinstance(number, int) and not 0 <= number < len(names):
            what = f"{place}: column {column!r} holds the class {number}, and the table names {len(names)} classes."
            raise DataError(what, "Remove rows without a class (they often have -1), or choose another split.")
        if isinstance(number, int):
            row[column] = ClassNumber(number)
            row[column].name = names[number]
    return row


def _classes(features: Any) -> dict[str, Sequence[str]]:
    """Columns that hold class numbers, and the names: of a data set's features, or their record in a parquet file."""
    found = {}
    for column, kind in dict(features or {}).items():
        is_dict = isinstance(kind, dict)
        names = kind.get("names") if is_dict else getattr(kind, "names", None)
        if names and (kind.get("_type") if is_dict else type(kind).__name__) == "ClassLabel":
            found[column] = list(names)
    return found


def _recorded(table: Any) -> Any:
    """What the package datasets wrote of the features into a parquet file."""
    record = (table.schema.metadata or {}).get(b"huggingface")
    try:
        return json.loads(record)["info"]["features"] if record else {}
    except (ValueError, KeyError, TypeError):
        return {}


# Building: every builder maps (columns, place) to (prompt, completion).

Build = Callable[[dict[str, Any], str], tuple[str, str]]


def _sound(pair: tuple[str, str], place: str, notes: Notes) -> tuple[str, str]:
    """Refuse what no tokenizer or no loss can use."""
    for side in pair:
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


def _templated(prompt: str, completion: str, notes: Notes) -> Build:
    def build(columns: dict[str, Any], place: str) -> tuple[str, str]:
        said = (
            _filled(prompt, columns, place, "prompt", notes),
            _filled(completion, columns, place, "completion", notes),
        )
        return said

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


def _detected(first: Record, chat: Chat, notes: Notes) -> Build:
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

    def build(row: dict[str, Any], at: str) -> tuple[str, str]:
        if missing := sorted(need - set(row)):
            what = f"{at}: no column {missing[0]!r}, which the first row ({place}) has."
            raise DataError(what, _near(missing[0], row))
        pair = maker(row, at, chat)
        if others := [name for name in row if name not in need and name not in optional]:
            _unread(others, row, at, _is_chat(schema, row, chat), notes)
        return pair

    return build


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
        raise DataError(what, f"{TEMPLATES_CURE} Known without templates: {known}.")
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


def _text(row: dict[str, Any], place: str, chat: Chat) -> tuple[str, str]:
    return "", _string(row, "text", place)


def _prompt_completion(row: dict[str, Any], place: str, chat: Chat) -> tuple[str, str]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        head, tail = (messages_of(row[name], place, name) for name in ("prompt", "completion"))
        return _rendered(_with_system(head, row, place), tail, row, place, chat)
    return _string(row, "prompt", place), _string(row, "completion", place)


def _chat(row: dict[str, Any], place: str, chat: Chat) -> tuple[str, str]:
    return _last_turn(messages_of(row["messages"], place, "messages"), row, place, chat)


def _sharegpt(row: dict[str, Any], place: str, chat: Chat) -> tuple[str, str]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and "from" in t for t in turns):
        raise DataError(f"{place}: conversations is not a list of {{from, value}}.", TEMPLATES_CURE)
    for turn in turns:
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT:
            raise DataError(f"{place}: unknown speaker {turn['from']!r}.", f"Known: {', '.join(SHAREGPT)}.")
    return _last_turn(messages_of([_turn(t) for t in turns], place, "conversations"), row, place, chat)


def _turn(turn: dict[str, Any]) -> Message:
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": SHAREGPT[turn["from"]], "content": turn.get("value")}


def _alpaca(row: dict[str, Any], place: str, chat: Chat) -> tuple[str, str]:
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
        return _rendered([turn], [{"role": "assistant", "content": answer}], row, place, chat)
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{ask}\n\n{middle}### Response:\n", answer


def _last_turn(messages: list[Message], row: dict[str, Any], place: str, chat: Chat) -> tuple[str, str]:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        what = f"{place}: the messages do not end with an answer of the assistant to someone."
        raise DataError(what, "Cut the row after the assistant's last message, or remove it.")
    messages = _with_system(messages, row, place)
    if sum(message["role"] == "assistant" for message in messages) > 1:
        chat.notes.add(LAST_ONLY, place)
    return _rendered(messages[:-1], messages[-1:], row, place, chat)


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


def _rendered(
    head: list[Message], tail: list[Message], row: dict[str, Any], place: str, chat: Chat
) -> tuple[str, str]:
    """Render with the chat template, so that prompt + completion is exactly the whole conversation."""
    return chat.pair(head, tail, row, place)
