"""What a recipe may say about a data set that nobody has described: templates or none, and a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from holdfast.data.messages import kind_of
from holdfast.data.metric import last_number
from holdfast.data.notes import BOOKKEEPING
from holdfast.data.readers import records_of
from holdfast.data.rows import Row, labels_of
from holdfast.data.schemas import SCHEMAS, schema_of
from holdfast.errors import DataError
from holdfast.recipe import Source, template_columns

LONG = 200  # ours: characters of a text that is more than an example
BOOKS = {"id", "uuid", "hash", "dump", "file", "filename", "path", "url", "domain", "date", "timestamp", "license"}
BEHIND = {*BOOKS, "score", "count", "length", "probability"}  # beside a document, behind a "_"; alone: an answer
LOOKED_AT = 20_000  # rows; more would not change a proposal
SAID = ("output", "completion", "messages", "conversations")  # columns of the schemas, with the answer at their end
ANSWERS = ("completion", "answer", "output", "response", "target", "label", "labels", "category", "class", "queue",
           "sentiment", "intent", "summary", "translation")  # fmt: skip # names that an answer's column often has


@dataclass(frozen=True)
class Proposal:
    """What was found.

    Attributes:
        rows: rows looked at; whole: whether that is all of them.
        columns: names in the first row.
        schema: a schema that needs no templates, or None.
        prompt, completion: templates, or None.
        left_out: columns that the templates do not name, each with the reason.
        labels: number of distinct answers if they are a closed set.
        metric: a name for `data.metric`.
    """

    rows: int
    whole: bool
    columns: tuple[str, ...]
    schema: str | None
    prompt: str | None
    completion: str | None
    labels: int | None
    metric: str
    left_out: tuple[str, ...] = ()


def propose(source: Source, base_dir: Path) -> Proposal:
    """Look at a data set.

    Raises:
        DataError: it cannot be read, holds no rows, is not for supervised tuning, or has no column to learn.
    """
    found = list(islice(iter(records_of(source, base_dir)[0]), LOOKED_AT + 1))
    records = [columns for _, columns in found[:LOOKED_AT]]
    if not records:
        raise DataError(f"{source.path}: holds no rows.", "Check the path and the split.")
    columns, sizes = tuple(map(str, records[0])), (len(records), len(found) <= LOOKED_AT)
    schema = schema_of(*found[0])
    if schema is None and _are_documents(records):
        left = tuple(f"{c} (bookkeeping)" for c in columns if c != "text")
        return Proposal(*sizes, columns, None, "", "{text}", None, "loss_per_byte", left)
    if schema is not None:
        labels, metric = _measured([_said(r) for r in records])
        metric = "loss_per_byte" if schema == "text" else metric
        return Proposal(*sizes, columns, schema, None, None, labels, metric)
    answer = _answer(records, source.path)
    asked, left_out = _asked(records, answer)
    labels, metric = _measured([_text(r.get(answer)) for r in records])
    left = tuple(f"{c} ({why})" for c, why in left_out.items())
    return Proposal(*sizes, columns, None, *_templates(asked, answer), labels, metric, left)


def _measured(answers: Sequence[str]) -> tuple[int | None, str]:
    """The number of labels, if the answers are a closed set, and a metric."""
    labels = labels_of([Row("", a) for a in answers]) if all(answers) else None
    metric = "accuracy" if labels else "number" if all(map(_is_number, answers)) else "loss"
    return len(labels) if labels else None, metric


def _said(record: Mapping[str, Any]) -> str:
    """The last answer of a row whose columns have a schema, "" where none is found."""
    found = next((record[c] for c in SAID if record.get(c)), None)
    if isinstance(found, list) and found and isinstance(found[-1], dict):
        found = found[-1].get("content", found[-1].get("value"))
    return _text(found)


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, list | dict) else str(value).strip()


def _is_number(answer: str) -> bool:
    return last_number(answer) is not None and len(answer.split()) == 1


def _unfit(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The columns that a template cannot write in every row looked at, and why."""
    names = dict.fromkeys(str(c) for r in records for c in r)
    return {c: why for c in names if (why := _why_unfit(c, [r.get(c) for r in records]))}


def _why_unfit(column: str, values: Sequence[Any]) -> str:
    """ "" for a column that a template can write in every row."""
    if not _may_stand(column):
        return "no name that a template can write"
    if kind := next((kind_of(v) for v in values if isinstance(v, list | dict)), ""):
        return kind
    blank = sum(not _text(v) for v in values)
    return f"blank in {blank} of {len(values)} rows" if blank else ""


def _are_documents(records: Sequence[dict[str, Any]]) -> bool:
    """Whether the rows are long texts, and all that stands beside them keeps the books."""
    names = [str(c) for c in records[0]]
    if "text" not in names or not all(c == "text" or _keeps_books(c) for c in names):
        return False
    texts = [_text(r.get("text")) for r in records]
    return all(texts) and sum(map(len, texts)) >= LONG * len(texts)


def _keeps_books(column: str) -> bool:
    name = column.lower()
    return name in BOOKKEEPING or name in BOOKS or ("_" in name and name.rsplit("_", 1)[-1] in BEHIND)


def _may_stand(column: str) -> bool:
    """Whether a template can name the column."""
    try:
        return template_columns(f"{{{column}}}") == (column,)
    except DataError:
        return False


def _answer(records: Sequence[dict[str, Any]], path: str) -> str:
    """The column to learn: one with an answer's name, else the one with the fewest values, the later of equals.

    Raises:
        DataError: there are not two columns, or the one with an answer's name cannot be written.
    """
    unfit = _unfit(records)
    columns = [c for c in map(str, records[0]) if c not in unfit and c not in BOOKKEEPING]
    named = [c for name in ANSWERS for c in columns if c.lower() == name]
    if not named and (lost := next((c for c in unfit if c.lower() in (*ANSWERS, "answers")), None)):
        what = f"{path}: the column {lost!r} is called like an answer, and no template can write it: {unfit[lost]}."
        cure = "Make it a column of text without blanks, or write data.prompt and data.completion over other columns."
        raise DataError(what, cure)
    if len(columns) < 2:
        what = f"{path}: of {', '.join(map(str, records[0]))} no two columns are text or numbers in every row."
        known = "; ".join(f"{name} ({', '.join(sorted(need))})" for name, need in SCHEMAS.items())
        raise DataError(what, f"Known without templates: {known}.")
    values = {c: len({_text(r[c]) for r in records}) for c in columns}
    return named[0] if named else min(reversed(columns), key=lambda c: values[c])


def _asked(records: Sequence[dict[str, Any]], answer: str) -> tuple[list[str], dict[str, str]]:
    """The columns of the prompt, and of those that are left out the reason."""
    left = {c: "bookkeeping" for c in map(str, records[0]) if c in BOOKKEEPING} | _unfit(records)
    rest = [c for c in map(str, records[0]) if c != answer and c not in left]
    number = {c: "a number beside text" for c in rest if not isinstance(records[0][c], str)}
    other = {c: "called like another answer" for c in rest if c.lower() in ANSWERS}
    for why in (number, other):
        if set(rest) - set(why):
            left |= why
            rest = [c for c in rest if c not in why]
    return rest, left


def _templates(texts: Sequence[str], answer: str) -> tuple[str, str]:
    """Each column of the prompt in a line, and the answer behind its own name."""
    lines = [f"{{{c}}}" if len(texts) == 1 else f"{_title(c)}: {{{c}}}" for c in texts]
    return "\n".join([*lines, f"{_title(answer)}:"]), f" {{{answer}}}"


def _title(column: str) -> str:
    words = column.replace("_", " ").strip().replace("{", "{{").replace("}", "}}")
    return words[:1].upper() + words[1:]
