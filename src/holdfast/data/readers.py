"""Files and data sets into records: csv, json, parquet, shipped files, folders and the hub.

Every reader yields (place, columns); a place is file:line, or data set[split]:number for what has no lines.
"""

import codecs
import csv
import io
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from holdfast.data.jsontext import DECODER, SYNTAX, Bent
from holdfast.data.messages import kind_of
from holdfast.errors import DataError, pip_install, suggest
from holdfast.recipe import FILE_KINDS, SHIPPED, TEXT_KINDS, Source, locate

BATCH = 1000  # rows of a table in memory at once
BUFFER = 1 << 20  # bytes: at the end of each, other threads take their turn
DATA_DIR = Path(__file__).parent / "shipped"  # behind holdfast:<file>

Record = tuple[str, dict[str, Any]]  # place (file:line) and columns


def records_of(source: Source, base_dir: Path, shown: str | None = None) -> tuple[Iterable[Record], bool]:
    """The rows, and whether they come from a table, which fills missing keys with null.

    shown: what places call the file or folder; None: a file's name, nothing for a folder, and a hub id.
    """
    path = source_file(source, base_dir)
    if path and path.is_dir() and (documents := _documents(path, f"{shown}/" if shown else "")):
        _check_local(source, "a folder of texts")
        return documents, False
    if path is None or path.is_dir():
        return _from_hub(source, path, base_dir, shown or source.path), True
    _check_local(source, "one file")
    return _from_file(path, shown or path.name), path.suffix == ".parquet"


def _check_local(source: Source, kind: str) -> None:
    """Refuse what says which part of a set on the hub is meant."""
    for key in ("name", "split", "revision"):
        if getattr(source, key) is not None:
            what = f"{source.path} is {kind}, and {key} {getattr(source, key)!r} has no meaning for it."
            raise DataError(what, f"Remove {key}.")


def source_file(source: Source, base_dir: Path) -> Path | None:
    """The local file or folder of a source; None for a name on the hub."""
    if source.path.startswith(SHIPPED):
        return _shipped(source.path.removeprefix(SHIPPED))
    return locate(source.path, base_dir)


def _shipped(name: str) -> Path:
    path = (DATA_DIR / name).resolve()
    if not path.is_file() or not path.is_relative_to(DATA_DIR.resolve()):
        files = (p for p in DATA_DIR.rglob("*") if p.suffix in FILE_KINDS)
        known = sorted(p.relative_to(DATA_DIR).as_posix() for p in files)
        raise DataError(f"{SHIPPED}{name} does not come with the package.", suggest(name, known))
    return path


def _from_file(path: Path, name: str) -> Iterator[Record]:
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(_lines(path, name), name, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".jsonl":
        return _jsonl(_lines(path, name), name)
    if path.suffix == ".json":
        return _read_json(read_text(path, name), name)
    if path.suffix == ".parquet":
        return _read_parquet(path, name)
    if path.suffix in TEXT_KINDS:
        return _document(path, name)
    what = f"{path.name}: files of kind {path.suffix or '(no suffix)'} cannot be read."
    raise DataError(what, f"Use one of {', '.join(FILE_KINDS)}.")


def _documents(folder: Path, before: str) -> Iterator[Record] | None:
    """The documents of a folder that holds nothing else, by name; None for another folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files or any(p.suffix not in TEXT_KINDS for p in files):
        return None
    return chain.from_iterable(_document(p, before + p.relative_to(folder).as_posix()) for p in files)


def _document(path: Path, name: str) -> Iterator[Record]:
    """A file that is one text."""
    yield f"{name}:1", {"text": read_text(path, name)}


def read_text(path: Path, name: str | None = None) -> str:
    """The text of a file, which messages call `name`."""
    name = name or path.name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}).", "Check its permissions.") from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}:1: UTF-16 text, not UTF-8.", "Save the file as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8 text.", "Save the file as UTF-8.") from None


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {kind_of(value)}, not an object.", "Write {'column': value, ...} in each row.")
    return place, value


def _lines(path: Path, name: str) -> Iterator[str]:
    """The lines of a file, one after the other: a large file is never in memory whole."""
    try:
        with path.open("rb", buffering=BUFFER) as file:
            for number, raw in enumerate(file, 1):
                yield _decoded(raw, name, number)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}).", "Check its permissions.") from None


def _decoded(raw: bytes, name: str, line: int) -> str:
    if line == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}:1: UTF-16 text, not UTF-8.", "Save the file as UTF-8.")
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{name}:{line}: not UTF-8 text.", "Save the file as UTF-8.") from None


def read_jsonl(text: str, name: str) -> Iterator[Record]:
    return _jsonl(text.split("\n"), name)  # splitlines() would cut at U+2028 inside a string


def _jsonl(lines: Iterable[str], name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
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


def _read_csv(lines: Iterable[str], name: str, delimiter: str) -> Iterator[Record]:
    _allow_long_cells()
    reader, first = csv.reader(_at_any_break(lines), delimiter=delimiter, strict=True), 1
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
        cure = "Check the quotes of that row."  # which begins there: one that is never closed goes on to the end
        raise DataError(f"{name}:{first}: not valid CSV ({error}).", cure) from None


def _allow_long_cells() -> None:
    """A document may stand in one cell; unless told, csv takes 131,072 characters."""
    try:
        csv.field_size_limit(sys.maxsize)
    except OverflowError:  # where a C long has 32 bits (Windows)
        csv.field_size_limit(2**31 - 1)


def _at_any_break(lines: Iterable[str]) -> Iterator[str]:
    """Lines that end with a line feed, cut at carriage returns too."""
    for line in lines:
        yield from io.StringIO(line, newline="") if "\r" in line else (line,)


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        what = f"{name}: reading parquet needs pyarrow, which cannot be imported ({error})."
        raise DataError(what, f"Run: {pip_install('datasets')}, or write the file as jsonl.") from error
    try:
        table = parquet.ParquetFile(path)
        classes = _classes(_recorded(table.schema_arrow))
        values = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(BATCH))
        for number, value in enumerate(values, 1):
            place = f"{name}:{number}"
            yield place, _named(value, classes, place)
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise DataError(f"{name}: not valid parquet ({problem}).", "Write the file again.") from None


def _from_hub(source: Source, folder: Path | None, base_dir: Path, shown: str) -> Iterator[Record]:
    """A hub data set, or a local folder laid out like one."""
    path = source.path
    if folder is None and (path.endswith(FILE_KINDS) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)):
        beside = [p.name for p in (base_dir / path).parent.glob("*") if p.is_file()]
        near = suggest(Path(path).name, beside) if beside else ""
        places = " or ".join(dict.fromkeys(map(str, (base_dir.absolute(), Path.cwd()))))
        what = f"{path}: no such file in {places}."
        raise DataError(what, near if near.startswith("Did") else "Check the path.")
    try:
        import datasets
    except ImportError as error:
        need = "a folder is read" if folder else "no local file has this name, and hub data sets are read"
        what = f"{path}: {need} by the package datasets, which cannot be imported ({error})."
        raise DataError(what, f"Run: {pip_install('datasets')}, or give a jsonl, json or csv file.") from error
    try:
        where = {"split": source.split, "revision": source.revision, "streaming": source.streaming}
        found = datasets.load_dataset(str(folder or path), source.name, **where)
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
    places = ((f"{shown}[{label}]:{number}", dict(row)) for number, row in _each(rows, path))
    return ((place, _named(row, classes, place)) for place, row in places)


def _each(rows: Iterable[Any], path: str) -> Iterator[tuple[int, Any]]:
    """The rows by number; a stream may break anywhere."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except Exception as error:  # the library's, as above; what is thrown in from outside is none
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"{path}: cannot be read behind row {number:,} ({problem})."
        raise DataError(what, "Start again: what is not read whole is not kept.") from None


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


def _recorded(schema: Any) -> Any:
    """What the package datasets wrote of the features into a parquet file."""
    record = (schema.metadata or {}).get(b"huggingface")
    try:
        return json.loads(record)["info"]["features"] if record else {}
    except (ValueError, KeyError, TypeError):
        return {}
