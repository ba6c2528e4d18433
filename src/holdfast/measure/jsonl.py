"""The user's own questions: `jsonl:<path>`, one JSON object a line.

    {"context": "Q: 2 + 2\nA:", "answer": " 4"}                            exact: the greedy answer must be just this
    {"context": "The sky is", "begins": " blue"}                          begins: the greedy text must begin with this
    {"context": "Sky:", "choices": [" blue", " red"], "answer": 0}         choice: index or text of the right one
    {"text": "A whole text to read."}                                      likelihood of its tokens

"prompt" may stand for "context". Text is joined as it stands, so an answer carries its own leading blank. An answer or
a choice ends with the text or with its line (`measure.asking`): " 1" is not right where a model says " 12". Optional:
"task" (else the file's name), "id" (else the row's number in its task), "cluster" (what a row shares with others).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.data.encoder import Encoder
from holdfast.data.notes import BOOKKEEPING as NOTES
from holdfast.data.readers import read_jsonl, read_text
from holdfast.errors import DataError, suggest
from holdfast.measure.probe import Ask, Group, Kind, Probe, Suite
from holdfast.measure.suites.in_context import shuffled

Rows = list[tuple[str, Probe]]  # place (file:line) and question
OPTIONAL = {"task", "id", "cluster"}
CURE = 'A row is {"context", "answer"}, {"context", "begins"}, {"context", "choices", "answer"} or {"text"}.'
METRICS: dict[Kind, str] = {"exact": "exact", "begins": "begins", "choice": "choice", "likelihood": "likelihood"}


def read_suite(path: str | Path, ask: Ask) -> Suite:
    """Read a file of questions; with `ask.limit`, so many of each task, drawn by `ask.seed`.

    Raises:
        DataError: no such file, a row that is none of the kinds, or one whose answers the tokenizer cannot write or
            writes alike; names file and line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"jsonl:{path}: no such file in {Path.cwd()}.", "Check the path.")
    tasks: dict[str, Rows] = {}
    for place, row in read_jsonl(read_text(file), file.name):
        task = _name(row, "task", place) or file.stem
        rows = tasks.setdefault(task, [])
        rows.append((place, _probe(task, len(rows), row, place)))
    if not tasks:
        raise DataError(f"{file.name}: holds no rows.", CURE)
    groups = tuple(_group(task, rows) for task, rows in tasks.items())
    if ask.tokenizer is not None:
        _check_tokens([row for rows in tasks.values() for row in rows], Encoder(ask.tokenizer))
    drawn = [p for task, rows in tasks.items() for p in _drawn(task, [p for _, p in rows], ask)]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = {"num_fewshot": 0, "limit": ask.limit, "seed": ask.seed, "content": digest}
    return Suite(f"jsonl:{path}", groups, tuple(drawn), settings)


def _check_tokens(rows: Rows, encoder: Encoder) -> None:
    """Refuse what no model with this tokenizer can be asked: answers that it does not write, or writes alike."""
    asked = [(place, p, a) for place, p in rows for a in p.answers]
    pairs, wheres = [(p.context, a) for _, p, a in asked], [place for place, _, _ in asked]
    seen: dict[tuple[str, tuple[int, ...]], str] = {}
    for (place, p, answer), split in zip(asked, encoder.join(pairs, end=False, wheres=wheres), strict=True):
        if p.kind in ("exact", "begins") and encoder.lacks(split.answer):
            what = f"{place}: the tokenizer has no token for a part of the answer {answer!r}, so no model can say it."
            raise DataError(what, "Change the answer, remove the row, or use a model whose tokenizer writes it.")
        twin = seen.setdefault((place, tuple(split.answer)), answer)
        if twin != answer:
            what = f"{place}: the choices {twin!r} and {answer!r} are the same tokens, so no model can tell them."
            raise DataError(what, "Rename one of them, or use a model whose tokenizer writes both.")


def _drawn(task: str, probes: Sequence[Probe], ask: Ask) -> list[Probe]:
    """The first `limit` of a fixed shuffle, in the order of the file: a file may be sorted by anything."""
    chosen = set(shuffled(f"{task}/{ask.seed}", range(len(probes)))[: ask.limit])
    return [p for n, p in enumerate(probes) if n in chosen]


def _group(task: str, rows: Rows) -> Group:
    first, clustered, seen = rows[0][1], any(p.cluster != p.id for _, p in rows), set()
    for place, p in rows:
        if p.kind != first.kind:
            what = f"{place}: the task {task!r} is {p.kind} here and {first.kind} at {rows[0][0]}."
            raise DataError(what, 'Give the rows of each kind a "task" of their own.')
        if p.id in seen:
            raise DataError(f"{place}: the id {p.id!r} is given twice.", 'Make "id" unique within its task.')
        seen.add(p.id)
    return Group(task, 1, _chance([p for _, p in rows]), METRICS[first.kind], clustered)


def _chance(probes: Sequence[Probe]) -> float:
    """Score of guessing: uniform, or always the commonest answer where all rows have the same choices."""
    if probes[0].kind != "choice":
        return 0.0
    uniform = sum(1 / len(p.answers) for p in probes) / len(probes)
    if len({frozenset(p.answers) for p in probes}) > 1:
        return uniform
    commonest = Counter(p.answer for p in probes).most_common(1)[0][1]
    return max(uniform, commonest / len(probes))


def _probe(task: str, n: int, row: dict[str, Any], place: str) -> Probe:
    kind, keys = _kind_of(row, place)
    unknown = [key for key in row if key not in keys | OPTIONAL | NOTES]
    if unknown:
        near = suggest(unknown[0], sorted(keys | OPTIONAL))
        what = f"{place}: a row of kind {kind} has no column {unknown[0]!r}."
        raise DataError(what, near if near.startswith("Did") else CURE)
    own = f"{task}/{_name(row, 'id', place) or n}"
    cluster = _name(row, "cluster", place) or own
    if kind == "likelihood":
        return Probe(task, own, kind, "", (_text(row, "text", place),), cluster=cluster)
    context = _text(row, "context" if "context" in row else "prompt", place)
    if kind in ("exact", "begins"):
        answer = _text(row, "answer" if kind == "exact" else "begins", place)
        return Probe(task, own, kind, context, (answer,), cluster=cluster)
    choices = _choices(row["choices"], place)
    return Probe(task, own, kind, context, choices, _right(row["answer"], choices, place), cluster=cluster)


def _kind_of(row: dict[str, Any], place: str) -> tuple[Kind, set[str]]:
    """What a row is, and the columns it needs."""
    if "context" in row and "prompt" in row:
        raise DataError(f"{place}: has both 'context' and 'prompt'.", "They mean the same: keep one.")
    context = "prompt" if "prompt" in row else "context"
    kinds: tuple[tuple[Kind, set[str]], ...] = (
        ("likelihood", {"text"}),
        ("choice", {context, "choices", "answer"}),
        ("exact", {context, "answer"}),
        ("begins", {context, "begins"}),
    )
    for kind, keys in kinds:
        if keys <= set(row):
            return kind, keys
    raise DataError(f"{place}: the columns {', '.join(map(str, row)) or '(none)'} make no question.", CURE)


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        what = f"{place}: {key!r} is {'empty' if isinstance(value, str) else 'not text'}."
        raise DataError(what, "Fill it in with text, or remove the row.")
    return _whole(value, place)


def _whole(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        cure = "Write the character itself, or both halves of the escape."
        raise DataError(f"{place}: half a character ({text[error.start]!r}).", cure) from None
    return text


def _name(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{place}: {key!r} is neither text nor a whole number.", "Give a short name, or leave it out.")
    return _whole(str(value), place)


def _choices(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(c, str) and c.strip() for c in value):
        raise DataError(f"{place}: 'choices' is not a list of two or more texts.", 'Write [" yes", " no"].')
    if len(set(value)) < len(value):
        raise DataError(f"{place}: 'choices' holds a text twice.", "Keep each choice once.")
    return tuple(_whole(c, place) for c in value)


def _right(answer: Any, choices: Sequence[str], place: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    what = f"{place}: the answer {answer!r} is not one of the {len(choices)} choices."
    raise DataError(what, f"Give its index from 0, or one of {', '.join(map(repr, choices))}.")
