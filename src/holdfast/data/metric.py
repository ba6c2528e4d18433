"""What "learned the task" means: the metrics by name, the one that fits some rows, and a user's own function.

A metric says what is asked of the model (a label, a probability, a text) and how its number is to be read. Scoring
itself is `measure.tuned_task`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from typing import Literal

from holdfast.data.rows import Row
from holdfast.errors import DataError, pip_install

Asked = Literal["labels", "answer", "text"]  # likeliest label, probability of the reference answer, generated text


@dataclass(frozen=True)
class Metric:
    """How one metric is asked and read.

    Attributes:
        name: what `data.metric` says.
        words: its name in a report.
        asked: what a model is asked for.
        unit: behind a number, where it is no share of rows.
        top: the best score where higher is better; None where lower is better and nothing bounds it.
        package: what it needs beside the core, as it is imported.
    """

    name: str
    words: str
    asked: Asked
    unit: str = ""
    top: float | None = 1.0
    package: str = ""

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.top is None


METRICS = {  # the names of recipe.METRIC_NAMES
    m.name: m
    for m in (
        Metric("accuracy", "accuracy", "labels"),
        Metric("exact_match", "exact match", "answer"),
        Metric("loss", "loss per token", "answer", "nats", None),
        Metric("loss_per_byte", "loss per byte", "answer", "nats", None),
        Metric("chrf", "chrF", "text", "of 100", 100.0, "sacrebleu"),
        Metric("rouge_l", "ROUGE-L", "text", "of 1", 1.0, "rouge_score"),
        Metric("number", "right number", "text"),
    )
}
_WORD = re.compile("[a-z0-9]")
_SIGN = r"(?:(?<![\w.)\]}])[-\u2212])?"  # the dash of "10-20" or "GPT-4" is none
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # commas part thousands, else they part numbers
_NUMBER = re.compile(rf"{_SIGN}(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def metric_of(name: str) -> Metric:
    """The metric behind a checked `data.metric`; `module:function` is scored on generated text."""
    return METRICS.get(name) or Metric(name, name, "text", "of 1")


def chosen(asked: str | None, labels: Sequence[str] | None) -> str:
    """The name of the metric: what the recipe asks for, else accuracy for a closed set of answers and loss for text.

    Raises:
        DataError: accuracy is asked of rows without a closed set of answers, or a package is missing.
    """
    name = asked or ("accuracy" if labels else "loss")
    if name == "accuracy" and not labels:
        what = "data.metric is accuracy, but the training rows have no closed set of answers (at most 50, each often)."
        raise DataError(what, "Write data.metric: exact_match or loss.")
    package = metric_of(name).package
    if package and not find_spec(package):
        what = f"data.metric is {name}, which needs the package {package}, and it is not installed."
        raise DataError(what, f"Run: {pip_install('metrics')}.")
    return name


def check_rows(name: str, rows: Sequence[Row]) -> None:
    """Raise DataError for a reference answer that the metric cannot compare with."""
    bad = next((r for r in rows if name == "number" and last_number(r.completion) is None), None)
    if bad:
        what = f"{bad.where}: data.metric is number, but the answer {bad.completion!r} holds no number."
        raise DataError(what, "Mend the row, or choose another data.metric.")
    wordless = next((r for r in rows if name == "rouge_l" and not _WORD.search(r.completion.lower())), None)
    if wordless:
        what = f"{wordless.where}: data.metric is rouge_l, which knows words of a to z and digits, and the answer"
        raise DataError(f"{what} {wordless.completion!r} has none.", "Mend the row, or write data.metric: chrf.")
    if metric_of(name).asked == "text" and any(not r.prompt for r in rows):
        what = f"data.metric is {name}, which reads what the model writes, but plain text has no prompt to answer."
        raise DataError(what, "Write data.metric: loss or loss_per_byte.")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, commas between thousands left out: "about 1,250.50 now" gives 1250.50."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
    except InvalidOperation:  # an exponent that no number has
        return None


def judge_of(name: str) -> Callable[[str, Row], float]:
    """(answer, row) -> score in [0, top] of a metric on text that comes with the package."""
    if name == "chrf":
        from sacrebleu.metrics.chrf import CHRF

        chrf = CHRF()
        return lambda answer, row: chrf.sentence_score(answer, [row.completion.strip()]).score
    if name == "rouge_l":
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"])
        return lambda answer, row: rouge.score(row.completion, answer)["rougeL"].fmeasure
    return lambda answer, row: float(last_number(answer) == last_number(row.completion))
