"""Turns the runs of lessons.py into docs/lessons.md and its plot. Every sentence with a number in it is made here."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

import lessons_before
from holdfast.files import write_text
from holdfast.measure import stats
from holdfast.measure.stats.bootstrap import task_draws
from leaderboard_cells import BASE, Data, scores_of, unpacked
from leaderboard_plans import BATCH, STEPS
from leaderboard_table import (
    FURTHER,
    NOT,
    OTHERS,
    OURS,
    Row,
    figure_kept,
    number,
    rank_correlation,
    seen,
    share,
    table,
)
from lessons_curve import Point, curve_words, points_of, save_plot
from lessons_plans import FEW, KINDS, LONGEST, LOW, PHRASINGS, RATES, ROWS, SHARES, SIZE, TASK, Setting, mixed

Rows = Mapping[str, Row]
SUITES = [s for s in (OURS, OTHERS, *FURTHER) if s == OTHERS or s in SIZE.suites]


def read(folder: Path, known: Sequence[Setting]) -> tuple[Data | None, Rows]:
    """The base's record, None where it is missing, and a row for every setting that was measured."""
    path = folder / f"{BASE}.json"
    if not path.is_file():
        return None, {}
    base = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, list[Data]] = {}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["method"] != BASE:
            found.setdefault(record["method"], []).append(record)
    rows = {s.name: Row(TASK, s.name, s.rate, found[s.name], base) for s in known if s.name in found}
    return base, rows


# ---- differences between two settings


def task_change(new: Row, old: Row) -> stats.Estimate:
    """Accuracy of `new` minus that of `old` on the same items, over the seeds that both have."""
    pairs = _pairs(new, old)
    before, after = ([x for pair in pairs for x in unpacked(pair[n]["task_scores"])] for n in (1, 0))
    clusters = [i for pair in pairs for i in range(len(unpacked(pair[0]["task_scores"])))]
    return stats.change(before, after, clusters if len(pairs) > 1 else None)


def kept_change(new: Row, old: Row, suite: str, draws: int = 4000) -> stats.Estimate | None:
    """The share of the base's score that `new` keeps minus what `old` keeps: chance left out, items resampled within
    tasks, the runs' answers to one item together. None where the suite was not measured."""
    pairs, known = _pairs(new, old), scores_of(new.base, suite)
    if not known or not all(suite in run["suites"] for pair in pairs for run in pair):
        return None
    chance = new.base["chance"][suite]
    above = difference = 0.0
    drawn_above, drawn_difference, items = np.zeros(draws), np.zeros(draws), 0
    for name, base in seen(known, chance).items():
        mine, theirs = (np.mean([scores_of(pair[n], suite)[name] for pair in pairs], axis=0) for n in (0, 1))
        rng = np.random.default_rng([0, zlib.crc32(name.encode())])
        at, drawn, size = task_draws(base, [mine, theirs], None, draws, rng)
        room = 1 - chance[name]
        above, difference = above + (at[0] - chance[name]) / room, difference + (at[1] - at[2]) / room
        drawn_above += (drawn[:, 0] - chance[name]) / room
        drawn_difference += (drawn[:, 1] - drawn[:, 2]) / room
        items += size
    if above <= 0:
        return None
    low, high = np.quantile(drawn_difference / drawn_above, [0.025, 0.975])
    return stats.Estimate(float(difference / above), float(low), float(high), items)


def _pairs(new: Row, old: Row) -> list[tuple[Data, Data]]:
    """Runs of both with the same seed."""
    theirs = {r["seed"]: r for r in old.runs}
    return [(r, theirs[r["seed"]]) for r in new.runs if r["seed"] in theirs]


def told(e: stats.Estimate | None) -> str:
    """A difference with its interval; bold where the interval leaves out zero."""
    if e is None:
        return "not measured"
    text = f"{e.value:+.2f} ({e.low:+.2f} to {e.high:+.2f})"
    return f"**{text}**" if e.low > 0 or e.high < 0 else text


def side(e: stats.Estimate | None) -> str:
    """What a difference says."""
    if e is None:
        return "unknown"
    return "more" if e.low > 0 else "less" if e.high < 0 else "no difference shown"


# ---- the first lesson

Advice = tuple[str, str, str]  # words, the setting that follows it, the one that does not


def advice() -> list[tuple[str, list[Advice]]]:
    """Popular advice, and for each the pairs of settings that test it."""

    def both(words: str, new: str, old: str = "") -> tuple[str, list[Advice]]:
        return words, [(kind, f"{kind}{new}", f"{kind}{old}") for kind in RATES]

    lower = f"lora at {LOW['lora']:g}"
    return [
        ("LoRA forgets less than full tuning", [("best rates", "lora", "full"), ("a lower rate", lower, "full")]),
        ("A lower learning rate keeps more", [(kind, f"{kind} at {LOW[kind]:g}", kind) for kind in RATES]),
        *(both(f"Mix in 20 % {words}", f" + {mixed(kind, 0.2)}") for kind, words in KINDS.items()),
        both(f"{ROWS} rows once in place of {FEW} ten times", "", ", homogeneous rows"),
        both("Eight phrasings of the prompt in place of one", ", eight phrasings"),
        both("20 % of the rows as few-shot prompts of the task itself", " + 20 % own few-shot"),
        both("The anchor term (KL on few-shot prompts of other tasks)", " + anchor"),
    ]


def advice_lines(rows: Rows) -> tuple[list[str], list[str]]:
    """The table of differences, and a sentence for each advice."""
    lines, words = [], []
    for title, pairs in advice():
        found = []
        for where, new, old in pairs:
            if new in rows and old in rows and _pairs(rows[new], rows[old]):
                a, b = rows[new], rows[old]
                task, kept = task_change(a, b), [kept_change(a, b, s) for s in (OURS, OTHERS)]
                seeds = str(len(_pairs(a, b)))
                lines.append([title, where, f"{new} - {old}", seeds, told(task), *map(told, kept)])
                found.append(f"{where}: keeps {side(kept[0])} in context, learns {side(task)}")
        words.append(f"- **{title}.** {'; '.join(found) if found else 'Not measured yet'}.")
    head = ["advice", "where", "difference", "seeds", "task", "in-context kept", "other authors' kept"]
    return table(head, lines) if lines else ["Not measured yet."], words


def before_lines() -> list[str]:
    """The same advice on runs of the leaderboard."""
    lines = [
        [task, words, f"{lessons_before.named(new)} - {lessons_before.named(old)}", str(len(_pairs(new, old))),
         told(task_change(new, old)), *(told(kept_change(new, old, s)) for s in (OURS, OTHERS))]
        for task, words, new, old in lessons_before.pairs()
        if _pairs(new, old)
    ]  # fmt: skip
    return table(
        ["task", "advice", "difference", "seeds", "accuracy", "in-context kept", "other authors' kept"], lines
    )


def share_lines(rows: Rows) -> list[str]:
    """What each share of each kind of general data keeps and costs, where it was measured."""
    lines = [["none", "0 %", *_of_tunings(rows, "")]]
    for kind, words in KINDS.items():
        lines += [[words, f"{100 * part:g} %", *_of_tunings(rows, f" + {mixed(kind, part)}")] for part in SHARES]
    shown = [line for line in lines if set(line[2:]) != {NOT}]
    return table(["general data", "share", *(f"{t}: {w}" for t in RATES for w in ("task", "in-context kept"))], shown)


def _of_tunings(rows: Rows, ending: str) -> list[str]:
    """(task, in-context kept) of full tuning and of LoRA with the same ending of their names."""
    found = [rows.get(f"{tuning}{ending}") for tuning in RATES]
    return [x for r in found for x in (number(r and r.accuracy().value, ".3f"), share(r.kept(OURS) if r else None))]


def all_lines(rows: Rows) -> list[str]:
    """Every setting and every suite."""
    columns: dict[str, Callable[[Row], str]] = {
        "setting": lambda r: r.method,
        "rate": lambda r: f"{r.rate:g}",
        "seeds": lambda r: str(len(r.runs)),
        "task": lambda r: f"{(a := r.accuracy()).value:.3f} ({a.low:.2f} to {a.high:.2f})",
        "in-context kept": lambda r: share(r.kept(OURS)),
        "other authors' kept": lambda r: share(r.kept(OTHERS)),
        **{s: lambda r, s=s: number(figure_kept(r, s)) for s in SUITES if s not in (OURS, OTHERS)},
        "KL task": lambda r: number(r.figure("kl task"), ".3f"),
        "KL few-shot": lambda r: number(r.figure("kl few-shot"), ".3f"),
        "CPU s": lambda r: f"{fmean(x['cost']['train_cpu_seconds'] for x in r.runs):.0f}",
    }
    return table(list(columns), [[of(r) for of in columns.values()] for r in rows.values()])


# ---- the second lesson

OWN = {  # whose answers a run learns from -> settings
    "the user's": ("full", "lora", f"lora at {LOW['lora']:g}", f"full at {LOW['full']:g}"),
    "the user's, KL to the base on them": ("full, kl on the task", "lora, kl on the task"),
    "the user's, KL to the base on the model's own": ("lora, kl on own answers",),
    "the base's own where right (S3FT)": ("full, s3ft", "lora, s3ft"),
    "the model's own, on policy (SDFT)": ("lora, sdft", f"lora, sdft at {LOW['lora']:g}"),
    "the user's, KL on few-shot prompts (anchor)": ("full + anchor", "lora + anchor"),
}


def own_lines(rows: Rows) -> list[str]:
    lines = [
        [
            words, name, number(rows[name].accuracy().value, ".3f"), share(rows[name].kept(OURS)),
            number(rows[name].figure("kl task"), ".3f"), number(rows[name].figure("kl few-shot"), ".3f"),
        ]
        for words, names in OWN.items()
        for name in names
        if name in rows
    ]  # fmt: skip
    head = ["answers learnt from", "setting", "task", "in-context kept", "KL task", "KL few-shot"]
    return table(head, lines) if lines else ["Not measured yet."]


def correlation_lines(points: Sequence[Point]) -> list[str]:
    """How well the KL on either kind of text ranks what is lost."""
    groups = {"all settings": points, **{k: [p for p in points if p.kind == k] for k in RATES}}
    lines = []
    for name, some in groups.items():
        cells = []
        for which in ("task", "few-shot"):
            found = rank_correlation([(TASK, p.setting, p.kl[which], p.lost) for p in some])
            known = found is not None and not math.isnan(found.value)
            cells.append(f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})" if found and known else "too few")
        lines.append([name, str(len(some)), *cells])
    return table(["runs", "n", "KL on the task", "KL on few-shot prompts"], lines)


# ---- the page


def left_words(rows: Rows, known: Sequence[Setting], seeds: int) -> str:
    """What is not measured yet."""
    none = [s.name for s in known if s.name not in rows]
    few = [n for n, r in rows.items() if len(r.runs) < seeds]
    text = f"Not measured at all: {'; '.join(none)}." if none else "Every setting was measured."
    if few:
        text += f" {len(few)} of {len(rows)} settings have fewer than {seeds} seeds, so what differs between runs"
        text += " of one setting is not in their intervals."
    return text


def page(base: Data, rows: Rows, known: Sequence[Setting], seeds: int) -> str:
    points, (lines, words) = points_of(rows.values()), advice_lines(rows)
    tasks = {s: seen(scores_of(base, s), base["chance"][s]) for s in base["suites"]}
    counts = ", ".join(f"{s} {sum(map(len, t.values()))} items of {len(t)} tasks" for s, t in tasks.items() if t)
    blind = [s for s, t in tasks.items() if not t]
    machines = sorted({r["made"]["machine"] for row in rows.values() for r in row.runs})
    text = [*TOP, f"- {left_words(rows, known, seeds)}"]
    text += [f"- n: task {len(unpacked(base['task_scores']))} test rows; {counts}."]
    text += [f"- The base is not above chance in: {', '.join(blind)}. Nothing can be lost there."] if blind else []
    text += [f"- Hardware: {'; '.join(machines)}.", "", "## Popular advice, tested", "", *words, "", *lines, ""]
    text += [ADVICE_WORDS, ""]
    text += ["## The same advice on earlier runs", "", lessons_before.WORDS, "", *before_lines(), ""]
    text += ["## How much general data", "", SHARE_WORDS, "", *share_lines(rows), ""]
    text += ["## On-policy against off-policy: does one curve explain all?", "", *own_lines(rows), ""]
    if points:
        text += ["Rank correlation with the share of in-context learning that is lost, with a 95 % interval that",
                 "resamples settings:", "", *correlation_lines(points), "", *curve_words(points), ""]  # fmt: skip
        text += ["![KL against forgetting](lessons.png)", ""]
    text += ["## Every setting", "", *all_lines(rows), ""]
    return "\n".join(text)


TOP = [
    "<!-- Written by benchmarks/lessons.py: change the code and run it again. -->",
    "",
    "# Two lessons",
    "",
    "Popular advice about tuning without forgetting, tested on one model and one task, and the question whether the",
    "KL to the base explains what is forgotten. SmolLM2-135M-Instruct on SST-2: what holds here need not hold for a",
    "large model or a long run.",
    "",
    f"- Every run: {STEPS} steps of {BATCH} rows out of the same {ROWS}, so each is seen once; general data takes the",
    "  place of rows of the task. AdamW, linear schedule, bf16 compute. Rates are the best known by task score on the",
    f"  [leaderboard](leaderboard.md): full {RATES['full']:g}, LoRA {RATES['lora']:g}; they were not searched anew",
    "  for each setting.",
    "- **kept**: tuned over base, corrected for chance, over the tasks on which the base is above chance; 95 %",
    "  intervals resample items. A difference is bold where its interval leaves out zero; it is over the same items",
    "  and seeds, and not corrected for the number of rows of the table.",
    f"- **homogeneous**: {FEW} rows ten times. **phrasings**: {len(PHRASINGS)} ways to write the prompt, in turn; the",
    "  test is always in the first.",
    "- **KL**: KL(base || tuned) in nats a token: on the answers of the task's test rows and what ends them, which",
    "  the base does not write, so that it is large wherever the task is learnt; and on all tokens of few-shot",
    "  prompts of other tasks.",
]
ADVICE_WORDS = (
    "A difference is the first setting minus the second. What keeps nothing cannot lose more: LoRA at its best rate "
    "by task score is there, so what helps full tuning may not be seen with it."
)
SHARE_WORDS = (
    f"A share is a part of a run's {STEPS * BATCH} rows; general rows are cut at {LONGEST} tokens. At 50 % the task "
    "has half of its rows left."
)


def write(folder: Path, known: Sequence[Setting], seeds: int, docs: Path) -> None:
    """Write the page and its plot.

    Raises:
        SystemExit: the base was not measured.
    """
    base, rows = read(folder, known)
    if base is None or not rows:
        raise SystemExit(f"There is no measured run in {folder}. Run lessons.py run first.")
    write_text(docs / "lessons.md", page(base, rows, known, seeds))
    points = points_of(rows.values())
    if points:
        save_plot(points, docs / "lessons.png")
