"""Task data as rows of prompt and completion, from local files, shipped files and the hub.

Nothing is guessed in silence: a row that does not fit is refused by file and line.
"""

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from holdfast.data.chat import Chat
from holdfast.data.notes import Notes
from holdfast.data.readers import Record, records_of
from holdfast.data.rendered import Turn
from holdfast.data.schemas import detected, sound, templated
from holdfast.data.shares import quotas, title
from holdfast.errors import DataError, suggest
from holdfast.recipe import Source

Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One training or test example.

    Attributes:
        prompt: what the model sees; "" only for plain text data.
        completion: what it must say. A chat turn keeps the template's own end token and newline.
        source: name of the data set in a mix.
        where: file:line, or data set[split]:number for what has no lines.
        turns: which characters of prompt + completion are trained on; () is the completion.
        ends: whether the completion comes to its end; not where more of a document follows.
    """

    prompt: str
    completion: str
    source: str = "task"
    where: str = ""
    turns: tuple[Turn, ...] = ()
    ends: bool = True


def read_rows(
    spec: str | Path | Mapping[str, Any] | Source,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    base_dir: str | Path,
    tokenizer: Any = None,
    source: str = "task",
    notes: list[str] | None = None,
    train_on: str = "assistant",
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
        train_on: of a conversation all answers of the assistant, its last, or all tokens (`data.train_on`).

    Raises:
        DataError: no such data, an empty set, or a row that does not fit; names file and line.
    """
    where_from, said = spec if isinstance(spec, Source) else Source.model_validate(spec), Notes()
    read = each_row(
        where_from, said, prompt=prompt, completion=completion, base_dir=Path(base_dir), tokenizer=tokenizer,
        source=source, train_on=train_on,
    )  # fmt: skip
    rows = list(read)
    if notes is not None:
        notes += said.lines()
    elif lines := said.lines():
        warnings.warn(f"{where_from.path}: {'; '.join(lines)}", stacklevel=2)
    return rows


def each_row(
    spec: Source,
    said: Notes,
    *,
    prompt: str | None,
    completion: str | None,
    base_dir: Path,
    tokenizer: Any,
    source: str = "task",
    train_on: str = "assistant",
    shown: str | None = None,
    of_records: Callable[[Iterator[Record]], Iterator[Record]] = iter,
) -> Iterator[Row]:
    """`read_rows`, one row after the other; what must be said of them is counted in `said`.

    shown: what places call the file, as `records_of` takes it. of_records: which records to take, in which order.
    """
    if (prompt is None) != (completion is None):
        raise DataError("One of prompt and completion is a template and the other is not.", "Give both.")
    found, arrow = records_of(spec, base_dir, shown)
    records = of_records(iter(found))
    first = next(records, None)
    if first is None:
        raise DataError(f"{spec.path}: holds no rows.", "Check the path and the split.")
    if prompt is None or completion is None:
        build = detected(first, Chat(tokenizer, said, arrow, train_on), said)
    else:
        build = templated(prompt, completion, said)
    for place, columns in chain([first], records):
        pair = sound(build(columns, place), place, said)
        yield Row(pair.prompt, pair.completion, source, place, pair.turns)


def split(rows: Sequence[Row], size: float | Mapping[str, int], seed: int) -> tuple[list[int], list[int]]:
    """Cut `size` rows (fraction below 1, else count; or the count of each set) off by seed.

    Returns the numbers of those that stay and of those cut off.

    Both parts keep the order of `rows`. Rows with the same prompt and completion stay on one side, so the cut may be a
    little smaller than asked. Of several sets (`Row.source`) each gives its part.
    """
    groups: dict[bytes, list[int]] = {}
    source, distinct = list[str](), Counter[str]()
    for i, row in enumerate(rows):
        group = groups.setdefault(identity(row), [])
        distinct[row.source] += not group
        group.append(i)
        source.append(row.source)
    sizes = Counter(source)
    left, order = dict(size) if isinstance(size, Mapping) else asked_of(sizes, size), list(groups.values())
    asked, cut = dict(left), set[int]()
    random.Random(seed).shuffle(order)
    for group in order:
        takes = Counter(source[i] for i in group)
        if all(left[name] >= count for name, count in takes.items()):
            cut.update(group)
            left = {name: room - takes[name] for name, room in left.items()}
    for name, want in asked.items():
        if want and not 0 < want - left[name] < sizes[name]:
            rows_of = f"{sizes[name]} rows{f' of {title(name)}' if len(sizes) > 1 else ''}"
            what = f"Cannot cut {want} of {rows_of} ({distinct[name]} distinct) and leave rows on both sides."
            raise DataError(what, "Change data.validation_size, or give a validation file.")
    return [i for i in range(len(rows)) if i not in cut], sorted(cut)


def asked_of(sizes: Mapping[str, int], size: float) -> dict[str, int]:
    """How many rows of each set to cut off: `size` of each (fraction below 1), or of all (a count)."""
    if size >= 1:
        return quotas(sizes, int(size), "data.validation_size")
    return {name: max(1, round(size * count)) if size > 0 else 0 for name, count in sizes.items()}


def identity(row: Row) -> bytes:
    """What a row says, in 16 bytes."""
    return hashlib.blake2b(f"{len(row.prompt)} {row.prompt}{row.completion}".encode(), digest_size=16).digest()


def cap(numbers: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """Draw `count` of them by seed (None: all, in order). A smaller draw is the start of a larger one."""
    order = list(numbers)
    if count is None:
        return order
    random.Random(seed).shuffle(order)
    return order[:count]


def labels_of(rows: Iterable[Row], most: int = 50) -> tuple[str, ...] | None:
    """Return the distinct completions by first appearance, or None for a free-form task.

    A task has labels when there are at most `most` of them, each used three times on average (ours).
    """
    labels: dict[str, None] = {}
    count = 0
    for row in rows:
        count += 1
        labels[row.completion] = None
        if len(labels) > most:
            return None
    return tuple(labels) if labels and count >= 3 * len(labels) else None


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
            other = "Or, if these answers are no closed set, write data.metric: exact_match or loss."
            raise DataError(what, " ".join([*([near] if near.startswith("Did") else []), listed, other]))


def leaks(train: Iterable[Row], test: Iterable[Row]) -> int:
    """Count the test rows whose prompt (for plain text: whose text) is also a training row's."""
    asked = [row.prompt or row.completion for row in test]
    wanted = set(asked)
    seen = wanted & {text for row in train if (text := row.prompt or row.completion) in wanted}
    return sum(text in seen for text in asked)
