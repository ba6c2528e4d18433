"""What a repair must not lose: the task, scored on the user's rows, or closeness to the tuned model's own answers.

Rows, or prompts, are cut like suites (`measure.parts`): those for choosing are not those of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.encoder import encoder_of
from holdfast.data.metric import METRICS, Metric, check_rows, chosen, judge_of, metric_of
from holdfast.data.rows import Row, cap, labels_of, read_rows, split
from holdfast.data.tokens import tokenize_all
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import DataError, suggest
from holdfast.files import content_key
from holdfast.measure import closeness as close
from holdfast.measure.parts import COARSE, FINE, REPORT
from holdfast.measure.suites import remembered
from holdfast.measure.tuned_task import judged, plainly, score_task, task_estimates, written

FEWEST_ROWS, CHOOSE_ROWS, REPORT_ROWS, SEED = 16, 256, 512, 0  # ours
Items = list[dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """The task of a repair.

    Attributes:
        name: for the report.
        source: "data" or "own answers".
        metric: how its numbers are read.
        asked: part -> what is asked there, plain data that names a measurement in the cache.
        score: (model, part) -> items that `tuned_task.task_estimates` reads.
        prompts: as tokens, of the parts for choosing.
        rows: the same with their answers.
    """

    name: str
    source: str
    metric: Metric
    asked: Mapping[str, Any]
    score: Callable[[Any, str], Items]
    prompts: Sequence[list[int]] = ()
    rows: Sequence[TokenRow] = ()

    def estimates(self, tuned: Items, items: Items) -> dict[str, Any]:
        """{"before": the tuned model's, "after": of `items`, "difference", ...} in the metric's unit."""
        return task_estimates(self.metric, tuned, items)

    def value(self, items: Items) -> float:
        """One number of a model, higher is better."""
        after = self.estimates(items, items)["after"]["value"]
        return -after if self.metric.lower else after


def from_data(
    path: str, *, prompt: str | None, completion: str | None, metric: str | None, tokenizer: Any, batch_tokens: int
) -> Goal:
    """The rows of a file, scored by the metric that fits them or that is named.

    Raises:
        DataError: the file, a row or the metric does not fit, or there are too few rows.
    """
    if metric is not None and metric not in METRICS:
        raise DataError(f"There is no metric {metric!r}.", suggest(metric, list(METRICS)))
    rows = read_rows(path, prompt=prompt, completion=completion, base_dir=Path.cwd(), tokenizer=tokenizer, notes=[])
    if len(rows) < FEWEST_ROWS:
        what = f"{path} holds {len(rows)} rows, too few to choose with some and report on others."
        raise DataError(what, f"Give {FEWEST_ROWS} or more rows that the tuning has not seen.")
    labels = labels_of(rows)
    name = chosen(metric, labels)
    check_rows(name, rows)
    closed, parts = labels if name == "accuracy" else None, _cut_rows(rows)
    asked = {part: [[[r.prompt, r.completion] for r in own], closed, name] for part, own in parts.items()}

    def score(model: Any, part: str) -> Items:
        return _scored(model, tokenizer, parts[part], name, closed, batch_tokens)

    own = [row for row in (*parts[COARSE], *parts[FINE]) if row.prompt and not row.turns]
    tokens = tokenize_all(own, tokenizer, None)
    return Goal(Path(path).stem, "data", metric_of(name), asked, score, _prompts(tokens), tokens)


def _prompts(rows: Sequence[TokenRow]) -> list[list[int]]:
    """What stands before the answers, each once."""
    found = [t.ids[: int(t.scored.argmax())] for t in rows]
    return [list(ids) for ids in dict.fromkeys(tuple(ids.tolist()) for ids in found)]


def _cut_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Equal rows stand in one part."""
    choose, report = split(rows, 0.5, SEED)
    first = cap(choose, CHOOSE_ROWS, SEED)
    half = (len(first) + 1) // 2
    numbers = {COARSE: first[:half], FINE: first[half:], REPORT: cap(report, REPORT_ROWS, SEED)}
    return {part: [rows[n] for n in own] for part, own in numbers.items()}


def _scored(
    model: Any, tokenizer: Any, rows: Sequence[Row], metric: str, labels: Sequence[str] | None, batch_tokens: int
) -> Items:
    kind = metric_of(metric)
    if kind.asked != "text":
        return score_task(model, tokenizer, rows, labels, batch_tokens=batch_tokens)
    said = written(model, tokenizer, rows, batch_tokens=batch_tokens)
    return judged(plainly(rows, encoder_of(model, tokenizer)), said, judge_of(metric), kind.top or 1.0)


def from_answers(model: Callable[[], Any], tokenizer: Any, sha: str, prompts: str | None, batch_tokens: int) -> Goal:
    """The tuned model's own answers to the prompts of a file, or to prompts that it draws.

    Args:
        model: gives the tuned model, if its answers are not in the cache.
        sha: identity of the tuned model.

    Raises:
        DataError: the file holds no prompts.
        ModelError: the model draws too few prompts.
    """
    texts = close.read_prompts(Path(prompts)) if prompts else None

    def make() -> list[Any]:
        tuned = model()
        asked = close.encoded(tuned, tokenizer, texts) if texts else close.drawn_prompts(tuned, tokenizer, SEED)
        return list(zip(asked, close.greedy_answers(tuned, tokenizer, asked), strict=True))

    pairs = remembered(content_key("own answers", sha, texts, SEED), make)
    half = (len(pairs) + 1) // 2
    cuts = {COARSE: pairs[: half // 2], FINE: pairs[half // 2 : half], REPORT: pairs[half:]}

    def score(model: Any, part: str) -> Items:
        return close.closeness(model, cuts[part], batch_tokens=batch_tokens)

    name = f"answers to {Path(prompts).name}" if prompts else "answers to its own prompts"
    asked = [list(prompt) for prompt, _ in pairs[:half]]
    rows = [token_row([*prompt, *answer], len(prompt)) for prompt, answer in pairs[:half] if answer]
    return Goal(name, "own answers", close.CLOSENESS, dict(cuts), score, asked, rows)
