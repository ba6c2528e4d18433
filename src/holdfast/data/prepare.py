"""A task's rows from its files to its tokens, written as they come: a large file is never in memory whole.

While some rows are read and rendered, those before them are tokenised: a tokenizer in Rust needs no turn of Python's.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from holdfast.data.documents import text_parts
from holdfast.data.encoder import Encoder
from holdfast.data.lengths import Limit
from holdfast.data.metric import check_rows, chosen
from holdfast.data.notes import Notes
from holdfast.data.rows import Row, asked_of, check_labels, each_row, labels_of, leaks, split
from holdfast.data.sets import Set, draw, grouped, sets_of
from holdfast.data.shares import equal, title
from holdfast.data.store import Texts, Writer
from holdfast.data.streams import rows_wanted, shuffled
from holdfast.data.tokens import tokenize_each
from holdfast.engine.pack import TokenRow
from holdfast.errors import DataError
from holdfast.recipe import Recipe

BATCH, AHEAD = 500, 3  # rows tokenised together; batches that wait
Numbered = tuple[int, Row]


@dataclass(frozen=True)
class Prepared:
    """What was written, by the numbers of its rows, and what is small enough for memory."""

    train: list[int]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] | None
    names: tuple[str, ...]  # what the labels say
    notes: list[str]
    key: str
    metric: str


class _Log(Notes):
    """Notes of tokenised rows, kept by place: whether a row is trained on shows only when all are read."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, str, str]] = []

    def add(self, text: str, place: str, example: str = "") -> None:
        self.said.append((place, text, example))


@dataclass
class _Reader:
    """One recipe's reading."""

    recipe: Recipe
    tokenizer: Any
    base_dir: Path
    encoder: Encoder
    limit: Limit
    tell: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    events: dict[int, list[tuple[str, str, str]]] = field(default_factory=dict)
    cut_off: set[str] = field(default_factory=set)  # streamed sets that have more rows

    def rows(self, role: str) -> Iterator[Row]:
        """The rows of all sets of a role ("train", ...), one set after the other."""
        count = 0
        for one in sets_of(self.recipe.data, role, self.base_dir):
            for row in self._rows(one):
                yield row
                count += 1
                if count % 1000 == 0:
                    self.tell(f"{role}: {count:,} rows")

    def _rows(self, one: Set) -> Iterator[Row]:
        said = Notes()
        kind = {"prompt": one.prompt, "completion": one.completion, "source": one.name, "shown": one.shown}
        kind |= {"train_on": self.recipe.data.train_on}
        most, seed, count = rows_wanted(self.recipe, one.source), self.recipe.seed_of_rows, 0
        kind |= {"of_records": (lambda records: shuffled(records, most, seed)) if most else iter}
        for row in each_row(one.source, said, base_dir=self.base_dir, tokenizer=self.tokenizer, **kind):
            yield row
            count += 1
        if most:
            self.notes.append(f"the first {count:,} rows of {one.source.title} are streamed, and no others read")
            self.cut_off |= {one.name} if count == most else set()
        self.notes += said.lines()

    def tokens(self, rows: Iterable[Numbered], writer: Writer) -> set[int]:
        """Tokenise and write rows; returns the numbers of those that are left."""
        kept: set[int] = set()
        for batch, (made, said) in _ahead(self._tokenized, _batches(rows, BATCH)):
            numbers = {row.where: number for number, row in batch}
            for (number, _), some in zip(batch, made, strict=True):
                writer.add_tokens(number, some)
                if some:
                    kept.add(number)
            for event in said:
                self.events.setdefault(numbers[event[0]], []).append(event)
        return kept

    def _tokenized(self, batch: Sequence[Numbered]) -> tuple[list[list[TokenRow]], list[tuple[str, str, str]]]:
        log = _Log()
        whole = self.recipe.data.train_on == "all"
        rows = [row for _, row in batch]
        made = tokenize_each(rows, self.encoder, self.limit, log, all_tokens=whole, documents=True)
        return made, log.said

    def say_of(self, train: Sequence[int]) -> None:
        """Add the notes of the rows that are trained on."""
        said = Notes()
        for number in sorted(self.events.keys() & set(train)):
            for place, text, example in self.events[number]:
                said.add(text, place, example)
        self.notes += said.lines()

    def check_left(self, name: str, left: int, of: int) -> None:
        """Refuse a set to train on that lost most of its rows, and say what a streamed one does without some."""
        self.limit.check_left(left, of, _of(name))
        if left < of and name in self.cut_off:
            lost = f"{of - left:,} of {of:,} streamed rows{_of(name)} are left out"
            self.notes.append(f"{lost}; no others are read for them, so rows that are left come more often")

    def asked(self, rows: Sequence[Row], which: str, longest: int) -> list[Row]:
        """The rows that are drawn to be measured: never a part of one, and what is left out is said."""
        spec, seed = self.recipe.data, self.recipe.seed_of_rows
        drawn = draw(rows, _set_of, spec.test_size, seed, "data.test_size", equal)  # each set is judged by itself too
        if len(drawn) < len(rows):
            self.notes.append(f"{len(drawn)} of {len(rows):,} {which} rows are drawn (data.test_size)")
        groups = grouped(drawn, _set_of)
        kept = [row for name, group in groups.items() for row in self._whole(group, which, longest, name)]
        if spec.test_size is None or len(groups) > 1 or len(kept) > len(drawn):  # else the draw has mixed them
            random.Random(seed).shuffle(kept)  # what looks at the first rows alone sees all sets, labels and texts
        return kept

    def _whole(self, drawn: list[Row], which: str, longest: int, name: str) -> list[Row]:
        """Those of the rows of one set that can be asked whole."""
        spec, plain = self.recipe.data, not drawn[0].prompt
        drop = spec.too_long in ("refuse", "drop") or (spec.too_long is None and not plain)
        limit = self.limit if drop else Limit(longest, "drop")
        if plain and spec.too_long in (None, "split"):
            drawn = [part for row in drawn for part in text_parts(row, self.encoder, longest)]
        asked = [replace(row, turns=()) for row in drawn]  # of a conversation its last answer
        made = tokenize_each(asked, self.encoder, limit, _Log())
        kept = [row for row, some in zip(drawn, made, strict=True) if some]
        limit.check_left(len(kept), len(drawn), _of(name), f"{which} rows")
        if len(kept) < len(drawn):
            lost = f"{len(drawn) - len(kept)} of {len(drawn)} {which} rows{_of(name)}"
            self.notes.append(f"{lost} are longer than {limit.most} tokens, left out")
        return kept


def prepare(
    folder: Path,
    recipe: Recipe,
    tokenizer: Any,
    base_dir: Path,
    longest: int,
    stops: Sequence[int] = (),
    tell: Callable[[str], None] | None = None,
) -> Prepared:
    """Read, cut, check and tokenise a recipe's rows; text and tokens of the training file are written to `folder`.

    Raises:
        DataError: a row or a set that cannot be used; names file and line.
    """
    spec, seed = recipe.data, recipe.seed_of_rows
    most = min(spec.max_length, longest)
    if (spec.stride or 0) >= most:
        what = f"data.stride is {spec.stride}, but the model reads {most} tokens at most."
        raise DataError(what, "Write a smaller data.stride.")
    limit = Limit(most, spec.too_long, spec.stride or most // 8, of_model=longest < spec.max_length)
    reader = _Reader(recipe, tokenizer, base_dir, Encoder(tokenizer, stops), limit, tell or (lambda words: None))
    if limit.of_model and "max_length" in spec.model_fields_set:
        reader.notes.append(f"data.max_length is {spec.max_length}, and the model reads {most} tokens at most")
    at_once = spec.train_size is None
    with Writer(folder) as writer:
        numbered = ((writer.add(row), row) for row in reader.rows("train"))
        left = reader.tokens(numbered, writer) if at_once else {number for number, _ in numbered}
        texts = writer.texts()
        labels, metric = _kind(texts, spec.metric)
        closed = labels if metric == "accuracy" else None
        train, validation, test = _parts(reader, texts, seed)
        for rows in (validation or [], test or []):
            check_labels(closed, rows)
            check_rows(metric, rows)
        set_of = texts.sources.__getitem__
        train = draw(train, set_of, spec.train_size, seed, "data.train_size")
        if not at_once:
            left = reader.tokens(((n, row) for n, row in zip(train, texts.only(train), strict=True)), writer)
        kept = [number for number in train if number in left]
        for name, numbers in grouped(train, set_of).items():
            reader.check_left(name, sum(number in left for number in numbers), len(numbers))
        reader.say_of(train)
    held, asked = _checked(reader, texts.only(kept), validation, test, closed, longest)
    names = tuple(map(reader.encoder.without_end, labels or ()))
    return Prepared(kept, held, asked, labels, names, reader.notes, _key(texts.only(kept), asked), metric)


def _kind(texts: Texts, asked: str | None) -> tuple[tuple[str, ...] | None, str]:
    """(labels, metric) that fit all sets. Labels are closed where those of each set are.

    Raises:
        DataError: accuracy is asked, and a set has free answers.
    """
    places = grouped(range(len(texts)), texts.sources.__getitem__)
    found = {name: labels_of(texts.only(numbers)) for name, numbers in places.items()}
    free = [name for name, labels in found.items() if not labels]
    if asked == "accuracy" and free and len(found) > 1:
        what = f"data.metric is accuracy, but the answers of the set {title(free[0])!r} are no closed set of labels."
        raise DataError(what, "Write data.metric: exact_match or loss, which measure all sets.")
    labels = None if free else tuple(dict.fromkeys(y for some in found.values() for y in some or ()))
    plain = any(not texts[numbers[0]].prompt for numbers in places.values())
    return labels, chosen(asked or ("loss_per_byte" if plain and not labels else None), labels)


def _set_of(row: Row) -> str:
    return row.source


def _of(name: str) -> str:
    """ " of NAME" for one set of several."""
    return "" if title(name) == name else f" of {title(name)}"


def _parts(reader: _Reader, texts: Texts, seed: int) -> tuple[list[int], list[Row] | None, list[Row] | None]:
    """(numbers of the training rows, validation, test); None for a set that is not there."""
    spec = reader.recipe.data
    train = list(range(len(texts)))
    validation = list(reader.rows("validation")) if spec.validation else None
    test = list(reader.rows("test")) if spec.test else None
    if validation is None and spec.validation_size != 0:
        train, cut = split(texts, spec.validation_size or _tenths(texts, spec.test_size), seed)
        validation = list(texts.only(cut))
    if test is None:
        reader.notes.append("no test set was given: the validation rows are reported")
    return train, validation, test


def _tenths(texts: Texts, most: int | None) -> dict[str, int]:
    """A tenth of each set, but no more than `most` in all: then in equal parts, where a small set gives its tenth."""
    tenths = asked_of(Counter(texts.sources), 0.1)
    return equal(tenths, most, "data.test_size") if most and most < sum(tenths.values()) else tenths


def _checked(
    reader: _Reader,
    train: Texts,
    validation: list[Row] | None,
    test: list[Row] | None,
    labels: tuple[str, ...] | None,
    longest: int,
) -> tuple[list[Row], list[Row]]:
    """The last look at all sets together; returns the rows of validation and test that are measured."""
    held = reader.asked(validation or [], "validation", longest)
    asked = held if test is None else reader.asked(test, "test", longest)
    if not asked:
        name = reader.recipe.data.name
        raise DataError(f"The test split of {name} is empty.", "Give data.test or data.validation_size.")
    if shared := leaks(train, asked):
        reader.notes.append(f"{shared} test prompts also stand in train")
    check_told_apart(train[0].prompt, labels, reader.encoder)
    if reader.encoder.ends_texts:
        said = "the tokenizer ends every text, prompts too; here it ends answers only, as in the exported one"
        reader.notes.append(said)
    return held, asked


def check_told_apart(prompt: str, labels: Sequence[str] | None, encoder: Encoder) -> None:
    """Raise DataError for two labels that are the same tokens (a lower-casing tokenizer, characters it lacks)."""
    written = encoder.join([(prompt, label) for label in labels or ()], end=True)
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(labels or (), written, strict=True):
        twin = seen.setdefault(tuple(tokens.answer), label)
        if twin != label:
            what = (
                f"The labels {twin!r} and {label!r} are the same tokens for this tokenizer, so no model can tell them."
            )
            raise DataError(what, "Rename one of them, or use a model whose tokenizer writes both.")


def _key(*sets: Iterable[Row]) -> str:
    sha = hashlib.sha256()
    for rows in sets:
        for row in rows:
            name = "" if row.source == title(row.source) else f"{row.source} "
            sha.update(f"{name}{len(row.prompt)} {len(row.completion)} {row.prompt}{row.completion}".encode())
            sha.update("".join(f" {a} {b} {weight}" for a, b, weight in row.turns).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:24]


def _batches(rows: Iterable[Numbered], size: int) -> Iterator[list[Numbered]]:
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch


def _ahead(work: Callable[[Any], Any], batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(batch, work(batch)) in order; batches are drawn while earlier ones are worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Any, Any]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(work, batch)))
            if len(waiting) > AHEAD:
                done, result = waiting.popleft()
                yield done, result.result()
        for done, result in waiting:
            yield done, result.result()
