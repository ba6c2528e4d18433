"""The shape of `report.json`, and the words for its numbers that page, terminal, Markdown and JUnit share.

Optional parts may be missing or None: every reader of a report leaves them out. Scores are in the unit of
their metric (accuracy: 0 to 1), retention is a fraction (1.0 is 100 % kept), times are seconds.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple, TypedDict, TypeGuard

Verdict = Literal["kept", "lost", "unclear", "not checked"]
AbilityStatus = Literal["kept", "lost", "unclear", "no loss shown", "not measurable"]


class Est(TypedDict, total=False):
    """A score with its 95 % interval; `n` is the number of items it rests on."""

    value: float
    low: float | None
    high: float | None
    n: int


class Ratio(TypedDict):
    """Share of an ability that is left: after / before, above chance. A fraction, 1.0 is all of it."""

    value: float
    low: float | None
    high: float | None


class VerdictPart(TypedDict):
    """The answer in one word and one sentence."""

    status: Verdict
    sentence: str


class ModelPart(TypedDict, total=False):
    """The base model: hub id or path, revision, hash of the weights, number type."""

    name: str
    revision: str | None
    sha: str | None
    dtype: str | None


class TunedPart(TypedDict, total=False):
    """The tuned model: its name, where it lies, hash of its weights, and what loading the export plainly gave."""

    name: str
    path: str
    sha: str | None
    export: str | None


class OtherPart(TypedDict, total=False):
    """The same answers by another metric."""

    metric: str
    unit: str
    lower: bool
    before: Est | None
    after: Est | None
    difference: Est | None


class SetPart(TypedDict, total=False):
    """The task's metric on the rows of one of several sets."""

    name: str
    before: Est | None
    after: Est | None
    difference: Est | None


class TaskPart(TypedDict, total=False):
    """The task that was tuned for.

    metric, unit: what a score is, and what stands behind it. lower: less is better. chance: the score of guessing.
    others: the same rows by other metrics. sets: the rows of each of several sets. answers: what base and tuned model
    say, side by side.
    """

    name: str
    metric: str
    unit: str
    lower: bool
    others: list[OtherPart]
    sets: list[SetPart]
    answers: list[ExamplePart]
    chance: float | None
    before: Est | None
    after: Est | None
    difference: Est | None
    split: str
    note: str | None


class CurvePart(TypedDict):
    """Score by number of examples in the prompt: `before[i]` and `after[i]` belong to `shots[i]`."""

    shots: list[int]
    before: list[Est]
    after: list[Est]


class AbilityTask(TypedDict, total=False):
    """One of the tasks an ability is the mean of."""

    name: str
    n: int
    chance: float | None
    metric: str
    before: Est | None
    after: Est | None
    difference: Est | None
    status: str


class AbilityPart(TypedDict, total=False):
    """One ability.

    margin: the share of the base's score that may go. p_loss: of "nothing was lost", Holm-adjusted over abilities.
    facts: further figures, name -> [before, after]. sight: the true loss these items find nine times in ten ("loss",
    and "share" of what the base has above chance).
    """

    name: str
    before: Est | None
    after: Est | None
    difference: Est | None
    retention: Ratio | None
    margin: float
    p_loss: float | None
    status: AbilityStatus
    note: str | None
    curve: CurvePart | None
    facts: dict[str, list[float | None]]
    sight: dict[str, float] | None
    tasks: list[AbilityTask]


class PaperPart(TypedDict):
    """Where a method comes from."""

    title: str
    arxiv: str | None


class PlanPart(TypedDict, total=False):
    """One method of the plan: its settings, the sites it acts at, what it does in one line."""

    method: str
    settings: dict[str, Any]
    sites: list[str]
    does: str
    paper: PaperPart | None


class TrainingSetPart(TypedDict):
    """One of several training sets: its rows, and how many were drawn, again and again where there are too few."""

    name: str
    path: str
    weight: float | None
    rows: int
    drawn: int


class DataPart(TypedDict, total=False):
    """The training data; `sets` where there are several."""

    name: str
    train: str
    rows: int
    sets: list[TrainingSetPart]


class MixPart(TypedDict):
    """What one data source really gave to training."""

    examples: int
    tokens: int


class RatePart(TypedDict):
    """The peak learning rate, and why; `tried`: [rate, mean loss of validation rows or None] of each short trial."""

    value: float
    why: str
    tried: list[list[float | None]]


class TrainingPart(TypedDict, total=False):
    """The run itself; `loss` and each of `terms` and `looks` are lists of [step, value]; `left_out`: shares of rows.

    budget: the share of the change that was kept, whether the bounds are met where it was chosen, and what was tried.
    ended: why it ended early. early: mean `grad_norm` (before clipping) and `loss` of the first `steps`. looks: what
    was seen during training. best_step: the look whose weights were kept.
    """

    steps: int
    rate: RatePart
    ended: str | None
    looks: dict[str, list[list[float]]]
    best_step: int | None
    early: dict[str, float | None]
    seconds: float
    tokens: int
    tokens_per_second: float
    loss: list[list[float]]
    terms: dict[str, list[list[float]]]
    realised_mix: dict[str, MixPart] | None
    left_out: dict[str, float]
    notes: list[str]
    budget: dict[str, Any] | None


class ExamplePart(TypedDict, total=False):
    """One item whose answer changed. All of it is untrusted text."""

    task: str
    prompt: str
    expected: str
    before: str
    after: str


class DiagnosisPart(TypedDict, total=False):
    """One finding; the first row of `table` holds the column names."""

    name: str
    finding: str
    detail: str
    table: list[list[Any]] | None


class SeenRow(TypedDict):
    """A training row as the model sees it; a token is [text, id, is it a target, is it special]. Untrusted text."""

    where: str
    source: str
    num_tokens: int
    num_targets: int
    tokens: list[list[Any]]


class PromptPart(TypedDict):
    """A whole prompt as the model saw it."""

    task: str
    text: str


class Report(TypedDict, total=False):
    """All of `report.json`. See the parts; `recipe` is the YAML text, `timing` is seconds by phase."""

    holdfast_version: str
    created: str
    kind: Literal["tune", "check", "measure"]
    verdict: VerdictPart
    model: ModelPart
    tuned: TunedPart | None
    task: TaskPart | None
    abilities: list[AbilityPart]
    plan: list[PlanPart]
    data: DataPart
    training: TrainingPart | None
    examples: list[ExamplePart]
    diagnosis: list[DiagnosisPart] | None
    timing: dict[str, float]
    versions: dict[str, str]
    settings: dict[str, Any]
    prompts: list[PromptPart]
    rows: list[SeenRow]
    recipe: str | None


class Status(NamedTuple):
    """How a status looks: a word, an icon (so that colour is never alone), a tone to colour it by."""

    word: str
    icon: str
    tone: str


STATUS = {
    "kept": Status("Kept", "\u2713", "kept"),
    "lost": Status("Lost", "\u2717", "lost"),
    "unclear": Status("Unclear", "?", "unclear"),
    "no loss shown": Status("No loss shown", "~", "none"),
    "not measurable": Status("Not measurable", "\u2013", "none"),
    "not checked": Status("Not checked", "\u2013", "none"),
    "measured": Status("Measured", "\u2022", "none"),
}

# Control characters, marks that reorder text, halves of surrogate pairs, and what XML 1.0 forbids.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def clean(value: Any) -> Any:
    """Copy a report so that it is safe to show: odd characters are spelled out, NaN and inf become None."""
    if isinstance(value, str):
        return _UNSAFE.sub(_spell, value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else clean(str(value))


def one_line(text: Any) -> str:
    """The text with every run of white space as one blank, for table cells and terminals."""
    return " ".join(str(text).split())


def status_of(part: Any, kind: str | None = None) -> Status:
    """The look of `part["status"]`. A `measure` run judges nothing, so it says 'Measured'."""
    name = (part or {}).get("status") or "not checked"
    if kind == "measure" and name == "not checked":
        name = "measured"
    return STATUS.get(name, Status(one_line(name).capitalize(), "\u2013", "none"))


def has(est: Any) -> TypeGuard[dict[str, Any]]:
    """Whether there is an estimate with a value."""
    return bool(est) and est.get("value") is not None


def has_interval(est: Any) -> bool:
    """Whether the estimate has both ends of its interval."""
    return has(est) and est.get("low") is not None and est.get("high") is not None


def number(value: float | None, sign: bool = False) -> str:
    """A score in a few digits: 0.47, 12.3, 104; 'n/a' for None."""
    if value is None:
        return "n/a"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    rounded = round(value, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:{'+' if sign and rounded else ''},.{digits}f}"


def interval(est: Any, sign: bool = False) -> str:
    """The 95 % interval as '0.45 to 0.49', or '' where there is none."""
    return f"{number(est['low'], sign)} to {number(est['high'], sign)}" if has_interval(est) else ""


def estimate(est: Any, sign: bool = False) -> str:
    """Score with interval: '0.47 (0.45 to 0.49)'."""
    if not has(est):
        return "n/a"
    span = interval(est, sign)
    return number(est["value"], sign) + (f" ({span})" if span else "")


def percent(fraction: float | None) -> str:
    """A fraction in whole percent: '98 %'."""
    return "n/a" if fraction is None else f"{round(100 * fraction) + 0} %"


def percent_interval(ratio: Any) -> str:
    """The 95 % interval of a retention: '94 to 101 %', or ''."""
    return f"{round(100 * ratio['low'])} to {percent(ratio['high'])}" if has_interval(ratio) else ""


def duration(seconds: float | None) -> str:
    """Seconds in words: '0.4 s', '3 min 12 s', '2 h 05 min'."""
    if seconds is None:
        return "n/a"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def metric_words(part: Any) -> str:
    """What a task's score is: 'accuracy', 'chrF of 100', 'loss per token in nats, lower is better'."""
    unit = part.get("unit") or ""
    words = f"{part.get('metric') or 'score'} {unit if unit.startswith('of ') else f'in {unit}' if unit else ''}"
    return one_line(f"{words}{', lower is better' if part.get('lower') else ''}")


def set_parts(task: Any) -> list[dict[str, Any]]:
    """The task on each of several sets, in the task's own metric."""
    same = {key: task.get(key) for key in ("metric", "unit", "lower")}
    return [{**same, **part} for part in task.get("sets") or []]


def gain_words(part: Any) -> str:
    """Whether a task's change is one for the better: 'better', 'worse' or 'no change shown'; '' where unknown."""
    change = part.get("difference")
    if not has_interval(change):
        return ""
    if change["low"] <= 0 <= change["high"]:
        return "no change shown"
    return "better" if (change["value"] > 0) != bool(part.get("lower")) else "worse"


def task_words(task: Any) -> str:
    """The change of the task as a sentence in the metric's own unit, or ''."""
    before, after = task.get("before"), task.get("after")
    if not (has(before) and has(after)):
        return ""
    what = f" ({metric_words(task)})" if task.get("metric") else ""
    return f"The task went from {number(before['value'])} to {number(after['value'])}{what}."


def _kept_words(ratio: Any) -> str:
    if not has(ratio):
        return ""
    span = percent_interval(ratio)
    return f" ({percent(ratio['value'])} kept{f', 95 % interval {span}' if span else ''})"


def ability_words(ability: Any) -> str:
    """One ability as a clause without its status: 'in-context 0.47 before, 0.46 after (98 % kept, ...)'."""
    name, before, after = one_line(ability.get("name") or "?"), ability.get("before"), ability.get("after")
    if has(before) and has(after):
        change = f"{number(before['value'])} before, {number(after['value'])} after"
        return f"{name} {change}{_kept_words(ability.get('retention'))}"
    there = next((e for e in (before, after) if has(e)), None)
    if there is None:
        return f"{name}, no score"
    return f"{name} {number(there['value'])}" + (f" (95 % interval {interval(there)})" if has_interval(there) else "")


def sight_words(ability: Any) -> str:
    """What the items of an ability can see, or ''."""
    seen = ability.get("sight")
    if not seen:
        return ""
    if seen["share"] >= 1:
        return "may miss even a total loss: there are too few"
    return f"finds a true loss of {percent(seen['share'])} or more nine times in ten"


def ability_status(ability: Any) -> Status:
    """Status of an ability; 'Measured' where only one model was measured and no status was given."""
    return status_of(ability if ability.get("status") else {"status": "measured"})
