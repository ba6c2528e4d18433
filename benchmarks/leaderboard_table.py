"""Turns the cells of the leaderboard into docs/leaderboard.md, its two plots, and the table of the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from holdfast.files import write_text
from holdfast.measure import stats
from holdfast.report import plots
from leaderboard_cells import BASE, BEFORE, SEEDS, WIDE_SEEDS, Board, Cell, Data, scores_of, unpacked
from leaderboard_plans import BATCH, CHOOSES, OUT, PLAIN, SECOND, STEPS, TEST, WIDE

MARKS = ("<!-- leaderboard -->", "<!-- end of leaderboard -->")
NOT = "not measured"
OURS, OTHERS = "in-context", "other authors"
FURTHER = ("language", "knowledge", "copying", "recognition", "instructions", "format", "reasoning", "safety")
NAMES = {"sst2": "SST-2", "tickets": "Tickets", "rte": "RTE", "agnews": "AG News", "talk": "Conversations"}
TEN, CLOSE = 10, 0.005  # half a point
README = {  # method -> its name there, and the rate to show where none is chosen
    "full": ("full fine-tuning", 2e-5),
    "lora": ("LoRA", 1e-3),
    "lora + replay": ("LoRA + 10 % general data", 3e-4),
    "half fine-tuning": ("half fine-tuning", 2e-5),
    "kl to base (task)": ("KL to the base on the task", 2e-5),
    "wise-ft": ("WiSE-FT, alpha 0.5", 2e-5),
    "promot": ("ProMoT", 2e-5),
    "in-context mix": ("few-shot rows of other tasks", 2e-5),
    "default": ("LoRA + ICLAnchor, the default of `holdfast tune`", 1.5e-3),
}


@dataclass(frozen=True)
class Row:
    """A method at one rate on one task. before: measured before rates were chosen on validation rows; open: the rate is
    its own, and others were not tried yet; stale: of a plan that is not the method's any more."""

    task: str
    method: str
    rate: float
    runs: Sequence[Data]
    base: Data
    before: bool = False
    open: bool = False
    stale: bool = False

    @property
    def name(self) -> str:
        said = {" (before)": self.before, " (one rate)": self.open, " (an earlier plan)": self.stale}
        return self.method + "".join(words for words, so in said.items() if so)

    def accuracy(self) -> stats.Estimate:
        """Of the task over all runs; the interval clusters the answers to one item."""
        items = [x for run in self.runs for x in unpacked(run["task_scores"])]
        clusters = [i for run in self.runs for i in range(len(unpacked(run["task_scores"])))]
        return stats.mean(items, clusters if len(self.runs) > 1 else None)

    def kept(self, suite: str) -> stats.Ratio | None:
        """Share of the base's score kept, chance left out, over tasks that the base does better than chance; None
        where the suite was not measured or nothing of it can be seen."""
        known, runs = scores_of(self.base, suite), [r for r in self.runs if suite in r["suites"]]
        if not known or not runs:
            return None
        chance, tasks = self.base["chance"][suite], {}
        for name, items in seen(known, chance).items():
            tuned = [x for run in runs for x in scores_of(run, suite)[name]]
            tasks[name] = (items * len(runs), tuned, list(range(len(items))) * len(runs))
        found = stats.retention(tasks, chance) if tasks else None
        return found if found and found.defined else None

    def within(self) -> tuple[int, int] | None:
        """(evaluations within half a point of the base or above, all), each a task of a suite and a mean over runs."""
        close = count = 0
        for suite in self.base["suites"]:
            runs = [scores_of(r, suite) for r in self.runs if suite in r["suites"]]
            for name, items in seen(scores_of(self.base, suite), self.base["chance"][suite]).items():
                if runs:
                    count += 1
                    close += fmean(fmean(r[name]) for r in runs) >= fmean(items) - CLOSE
        return (close, count) if count else None

    def figure(self, name: str) -> float | None:
        """Mean over the runs that have it."""
        found = [r["figures"][name] for r in self.runs if name in r["figures"]]
        return fmean(found) if found else None

    def peak(self) -> int | None:
        return max((r["cost"]["peak_bytes"] for r in self.runs if "peak_bytes" in r["cost"]), default=None)

    def made(self) -> Data:
        """Of the oldest run."""
        return min((r["made"] for r in self.runs), key=lambda m: m["date"])


def seen(tasks: Mapping[str, list[float]], chance: Mapping[str, float]) -> dict[str, list[float]]:
    """The tasks on which the base is above chance: on others nothing can be lost."""
    return {n: items for n, items in tasks.items() if stats.measurable(items, None, chance[n])}


# ---- which rows there are


def rows_of(board: Board) -> list[Row]:
    """Every method at its chosen rate; where none is chosen yet, at its own and at each that was measured before."""
    new, old = grouped(board.records()), grouped(board.records(before=True))
    out = []
    for (task, method, rate), runs in new.items():
        if method not in board.methods or (task, BASE, None) not in new:
            continue
        chosen = board.chosen(method)
        if rate == (board.methods[method].rate if chosen is None else chosen):
            now = [r for r in runs if board.is_current(r)]  # what two plans learnt has no mean
            base, stale = new[task, BASE, None][0], not now
            out.append(Row(task, method, rate, now or runs, base, open=chosen is None, stale=stale))
    known = {(r.task, r.method) for r in out if not r.open}
    for (task, method, rate), runs in old.items():
        if method != BASE and (task, method) not in known:
            out.append(Row(task, method, rate, runs, old[task, BASE, None][0], before=True))
    return sorted(out, key=lambda r: (r.task, r.before, -(merit(out, r) or -9)))


def grouped(records: Iterable[Data]) -> dict[tuple[str, str, Any], list[Data]]:
    out: dict[tuple[str, str, Any], list[Data]] = {}
    for record in records:
        out.setdefault((record["task"], record["method"], record["rate"]), []).append(record)
    return out


def merit(rows: Sequence[Row], row: Row) -> float | None:
    """What was learnt, as a share of the best plain run's gain on that task, times what was kept in context (mean of
    both suites); neither counts more than 1."""
    base = fmean(unpacked(row.base["task_scores"]))
    plain = [fmean(r["figures"]["task"] for r in p.runs) for p in rows if p.task == row.task and p.method in PLAIN]
    gain = max(plain, default=0.0) - base
    kept = [figure_kept(row, suite) for suite in (OURS, OTHERS)]
    if gain <= 0 or None in kept:
        return None
    learnt = (fmean(r["figures"]["task"] for r in row.runs) - base) / gain
    return max(0.0, min(1.0, learnt)) * max(0.0, min(1.0, fmean(k for k in kept if k is not None)))


def figure_kept(row: Row, suite: str) -> float | None:
    """As `Row.kept`, the value alone: no resampling."""
    known, runs = scores_of(row.base, suite), [scores_of(r, suite) for r in row.runs if suite in r["suites"]]
    if not known or not runs:
        return None
    chance = row.base["chance"][suite]

    def above(of: Sequence[Mapping[str, Sequence[float]]], names: Iterable[str]) -> float:
        return fmean((fmean(r[n]) - chance[n]) / (1 - chance[n]) for r in of for n in names)

    names = list(seen(known, chance))
    return above(runs, names) / above([known], names) if names else None


def best(board: Board, count: int = TEN) -> list[str]:
    """The methods that are measured on all tasks: the best on the first task whose rate is chosen, and the plain ones."""
    rows = [r for r in rows_of(board) if r.task == CHOOSES and not (r.before or r.open)]
    ranked = sorted((r for r in rows if merit(rows, r) is not None), key=lambda r: -(merit(rows, r) or 0.0))
    names = [r.method for r in ranked if r.method not in PLAIN][:count]
    return [*(n for n in PLAIN if n in board.methods and board.chosen(n) is not None), *names]


# ---- costs


def times(board: Board, rows: Sequence[Row], overhead: Mapping[str, Any]) -> dict[tuple[str, str, bool], float]:
    """(task, method, before) -> training time over that of plain training of the same kind on the same machine: of CPU
    seconds; of rows from before, measured apart (overhead.json)."""
    out: dict[tuple[str, str, bool], float] = {}
    for row in rows:
        if row.before:
            found = overhead.get(row.task, {"ratio": {}})["ratio"].get(row.method)
        else:
            kind = "lora" if board.methods[row.method].adapter else "full"
            plain = [r for r in rows if (r.task, r.method, r.before) == (row.task, kind, False)]
            own, theirs = spent(row.runs, row), spent(plain[0].runs, row) if plain else None
            found = own / theirs if own and theirs else None
        if found is not None:
            out[row.task, row.method, row.before] = found
    return out


def spent(runs: Sequence[Data], row: Row) -> float | None:
    """Median CPU seconds of training on the machine of `row`."""
    here = [r["cost"]["train_cpu_seconds"] for r in runs if r["made"]["machine"] == row.made()["machine"]]
    return median(here) if here else None


# ---- does the KL on the task predict forgetting?


def forgetting(board: Board) -> list[tuple[str, str, float, float]]:
    """(task, method, KL to the base, share of in-context learning lost) of every run that has both."""
    runs = board.records()
    bases = {r["task"]: r for r in runs if r["method"] == BASE}
    out = []
    for run in runs:
        if "kl" in run["figures"] and run["task"] in bases:
            row = Row(run["task"], run["method"], run["rate"], [run], bases[run["task"]])
            kept = figure_kept(row, OURS)
            if kept is not None:
                out.append((run["task"], run["method"], run["figures"]["kl"], 1 - kept))
    return out


def rank_correlation(points: Sequence[tuple[str, str, float, float]], draws: int = 2000) -> stats.Estimate | None:
    """Spearman's correlation with a 95 % interval that resamples methods, whose runs are alike; None below five."""
    from scipy.stats import rankdata

    groups = [[p[2:] for p in points if p[1] == name] for name in sorted({p[1] for p in points})]
    if len(groups) < 5:
        return None

    def of(some: Sequence[Any]) -> float:
        x, y = np.array([pair for group in some for pair in group]).T
        if x.min() == x.max() or y.min() == y.max():
            return float("nan")
        return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])

    rng = np.random.default_rng(0)
    drawn = [of([groups[i] for i in rng.integers(0, len(groups), len(groups))]) for _ in range(draws)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return stats.Estimate(of(groups), float(low), float(high), len(points))


def says(r: stats.Estimate | None) -> str:
    """What a correlation means here, in words."""
    if r is None:
        return "Too few methods have been measured to say."
    words = "does not predict" if r.low <= 0 else "predicts" if r.low >= 0.7 else "predicts in part"
    return (
        f"Over {r.n} runs it {words} the share of in-context learning that is lost: rank correlation "
        f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})."
    )


# ---- the page


def share(ratio: stats.Ratio | None) -> str:
    return NOT if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def number(value: float | None, form: str = ".2f") -> str:
    return NOT if value is None else f"{value:{form}}"


def spread(row: Row) -> str:
    a, each = row.accuracy(), [r["figures"]["task"] for r in row.runs]
    runs = f", runs {min(each):.3f} to {max(each):.3f}" if len(each) > 1 else ""
    return f"{a.value:.3f} ({a.low:.2f} to {a.high:.2f}{runs})"


def part_of(within: tuple[int, int] | None) -> str:
    return NOT if within is None else f"{100 * within[0] / within[1]:.0f} % of {within[1]}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    first, *rest = [f"| {' | '.join(x)} |" for x in (head, *lines)]
    return [first, f"|{'---|' * len(head)}", *rest]


def short(rows: Sequence[Row], cost: Mapping[Any, float]) -> list[str]:
    """The best rows of the first task."""
    here = [r for r in rows if r.task == CHOOSES]
    ranked = sorted((r for r in here if merit(rows, r) is not None), key=lambda r: -(merit(rows, r) or 0))
    plain = [r for r in ranked[TEN:] if r.method in PLAIN]
    lines = [
        [
            f"**{r.name}**" if r.method == "default" else r.name, f"{r.rate:g}", f"{r.accuracy().value:.3f}",
            number(figure_kept(r, OURS)), number(figure_kept(r, OTHERS)), part_of(r.within()),
            number(r.figure("kl"), ".3f"), number(cost.get((r.task, r.method, r.before))), number(merit(rows, r)),
        ]
        for r in [*ranked[:TEN], *plain]
    ]  # fmt: skip
    head = ["method", "rate", NAMES[CHOOSES], "in-context kept", "other authors' kept", "within half a point",
            "KL", "time", "learnt x kept"]  # fmt: skip
    return table(head, lines)


def whole(rows: Sequence[Row], cost: Mapping[Any, float], machines: Mapping[str | None, str]) -> list[str]:
    """Everything about the rows of one task. A column that no row has is named below the table."""
    columns = {
        "method": [r.name for r in rows],
        "rate": [f"{r.rate:g}" for r in rows],
        "seeds": [str(len(r.runs)) for r in rows],
        "task": [spread(r) for r in rows],
        "in-context kept": [share(r.kept(OURS)) for r in rows],
        "other authors' kept": [share(r.kept(OTHERS)) for r in rows],
        **{suite: [number(figure_kept(r, suite)) for r in rows] for suite in FURTHER},
        "within half a point": [part_of(r.within()) for r in rows],
        "KL": [number(r.figure("kl"), ".3f") for r in rows],
        "time": [number(cost.get((r.task, r.method, r.before))) for r in rows],
        "memory": [NOT if r.peak() is None else f"{(r.peak() or 0) / 2**30:.2f} GiB" for r in rows],
        "made": [f"{(m := r.made())['date']} {m['commit']} {machines[m['machine']]}".rstrip() for r in rows],
    }
    empty = [name for name, cells in columns.items() if set(cells) == {NOT}]
    shown = {name: cells for name, cells in columns.items() if name not in empty}
    base = rows[0].base
    mine = {s: fmean(fmean(x) for x in scores_of(base, s).values()) for s in base["suites"]}
    scores = ", ".join(f"{s} {x:.3f}" for s, x in mine.items())
    first = f"The base: task {fmean(unpacked(base['task_scores'])):.3f}, {scores}."
    last = ["", f"Not measured in any of these rows: {', '.join(empty)}."] if empty else []
    return [first, "", *table(list(shown), zip(*shown.values(), strict=True)), *last]


def chosen_rates(board: Board) -> list[str]:
    """What chose the rates."""
    path = board.folder / "chosen.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = []
    for name, choice in found.items():
        tried = {float(rate): x for rate, x in choice["validation"].items()}
        edge = " (at an edge)" if choice["rate"] in (min(tried), max(tried)) else ""
        scores = ", ".join(f"{rate:g}: {x:.3f}" for rate, x in tried.items())
        lines.append([name, f"{choice['rate']:g}{edge}", scores, choice["sha"][:8]])
    return table(["method", "chosen rate", "validation accuracy at each rate", "hash"], lines)


def page(board: Board, rows: Sequence[Row], overhead: Mapping[str, Any]) -> str:
    cost, points = times(board, rows, overhead), forgetting(board)
    letters = {m: chr(65 + n) for n, m in enumerate(sorted({r.made()["machine"] for r in rows} - {None}))}
    left = board.missing(board.wanted())
    text = [*TOP, *short(rows, cost), "", "![what was learnt against what was kept](leaderboard.png)", "", *COLUMNS]
    text += [f"- Cells that are missing: {len(left)}. What failed when it was last tried: "
             f"{'; '.join(f'{c} ({why})' for c, why in board.failed.items()) or 'nothing'}.", ""]  # fmt: skip
    text += ["## Does the KL on the task predict forgetting?", "", says(rank_correlation(points))]
    for task in NAMES:
        r = rank_correlation([p for p in points if p[0] == task])
        text += [f"{NAMES[task]}: {r.value:.2f} ({r.low:.2f} to {r.high:.2f}), {r.n} runs."] if r else []
    text += ["", "![KL against forgetting](leaderboard-kl.png)"] if len(points) > 1 else []
    machines: dict[str | None, str] = {**letters, None: ""}
    for task, title in NAMES.items():
        if some := [r for r in rows if r.task == task]:
            text += ["", f"## {title}", "", *whole(some, cost, machines)]
    text += ["", "## The learning rates", "", *chosen_rates(board), "", "## Machines", ""]
    text += [f"- {letter}: {machine}" for machine, letter in letters.items()] or ["None recorded yet."]
    text += [f"- times of rows from before: {o['note']}" for o in overhead.values()]
    return "\n".join(text) + "\n"


TOP = [
    "<!-- Written by benchmarks/leaderboard.py: change the code and run it again. -->",
    "",
    "# Leaderboard",
    "",
    "What each method learns and what it keeps, on SmolLM2-135M-Instruct. `make leaderboard` goes on where it stopped.",
    "The best rows on SST-2 first, and plain tuning beside them:",
    "",
]
COLUMNS = [
    "## What the columns mean",
    "",
    f"- Every run: {STEPS} steps of {BATCH} rows, AdamW, linear schedule, bf16 compute; the same rows in the same order",
    "  for every method. TRL's rows are TRL's trainer with its own defaults on the same rows.",
    "- **rate**: the best of three on SST-2, chosen on validation rows cut off the training rows, and written down with",
    "  a hash before further seeds and tasks were trained; of equal ones the lowest. One grid for all methods that train",
    "  the model's own weights, one for all that train LoRA. Other tasks use the rate of SST-2.",
    f"- **seeds**: {SEEDS}; on RTE, AG News and conversations {WIDE_SEEDS}, for the ten best and plain tuning.",
    f"- **task**: the likeliest label is right, on {TEST[CHOOSES]} test rows ({SECOND}, RTE, AG News: {TEST[SECOND]}; of",
    f"  {TEST[WIDE[-1]]} conversations the whole answer must be exact). The interval is over items and clusters the seeds'",
    "  answers to the same item; the spread between runs stands beside it. Differences within the spread are noise.",
    "- **in-context kept**: greedy exact match at 8 shots on the built-in held-out tasks, in three formats each; tuned",
    "  over base, corrected for chance, tasks left out whose base is not above chance. **other authors'**: 12 tasks of",
    "  the function-vectors data in their own format. Further suites the same ([suites](suites.md)); those in which the",
    "  model writes are asked of second seeds alone. Prompt, prefix and phrasing prompt tuning change no weight, and",
    "  abilities are asked without the prompt: what they keep is the base itself, as anybody keeps who leaves it off.",
    "- **within half a point**: share of all evaluations (each task of each suite that can be measured, mean over runs)",
    "  that are at most half a point below the base (the best published figure of this kind is 73 %).",
    "- **KL**: KL(base || tuned) in nats, mean over the answer's tokens of the task's own test rows.",
    "- **time**: CPU seconds of training, preparation included, over those of plain tuning on the same machine (LoRA",
    "  for what trains an adapter, else full). **memory**: most that the process held until the end of training.",
    "- **learnt x kept** (ours, for the order alone): the gain as a share of the best plain run's gain, times the mean",
    "  of both in-context columns; neither counts more than 1.",
    "- **made**: when, from which commit, on which machine (a letter, see below; none: not recorded).",
    "- **(one rate)**: at its own rate of `leaderboard_plans.py`, one seed; no rate is chosen yet.",
    "- **(before)**: measured before rates were chosen on validation rows and before the other columns existed; shown",
    "  at every rate measured, until the method's rate is chosen.",
]


def points_of(rows: Sequence[Row]) -> list[Data]:
    """For the plot; only the best, the plain and other people's are named."""
    here = [r for r in rows if r.task == CHOOSES]
    ranked = sorted(here, key=lambda r: -(merit(rows, r) or 0.0))
    named = {id(r) for r in ranked[:TEN]} | {id(r) for r in here if r.method in PLAIN or r.method.startswith("TRL")}
    out = []
    for r in here:
        kept = r.kept(OURS)
        if kept is not None:
            out.append({
                "name": f"{r.method} {r.rate:g}" if id(r) in named else "",
                "task": r.accuracy().to_dict(),
                "kept": {"value": kept.value, "low": kept.low, "high": kept.high, "n": 0},
                "highlight": r.method == "default",
            })  # fmt: skip
    return out


def save_kl(points: Sequence[tuple[str, str, float, float]], path: Path) -> None:
    """KL on the task (log scale) against the share of in-context learning lost, one dot a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="KL(base || tuned) on the task's test rows, nats a token",
                              ylabel="share of in-context learning lost")  # fmt: skip
    for task, title in NAMES.items():
        some = [p for p in points if p[0] == task]
        if some:
            axes.plot([max(p[2], 1e-6) for p in some], [p[3] for p in some], "o", markersize=4, label=title)
    axes.legend(frameon=False)
    axes.grid(color="#d8dee4")
    figure.savefig(path, format="png", bbox_inches="tight")


def readme(board: Board, rows: Sequence[Row], path: Path) -> None:
    """Put the short table on the first screen of the README, between its marks."""
    here = {(r.method, r.rate if r.before else None): r for r in rows if r.task == CHOOSES and not r.open}
    lines = []
    for name, (words, rate) in README.items():
        row = here.get((name, None)) or here.get((name, rate))
        if row:
            words += " \\*" if row.before else ""
            bold = "**" if name == "default" else ""
            lines.append([f"{bold}{words}{bold}", f"{row.accuracy().value:.2f}", share(row.kept(OURS))])
    base = board.read(Cell(CHOOSES, BASE)) or json.loads(
        (board.folder / BEFORE / Cell(CHOOSES, BASE).file).read_text()
    )
    first = ["none (base)", f"{base['figures']['task']:.2f}", "1.00"]
    text = table(["training", "SST-2 accuracy", "in-context learning kept"], [first, *lines])
    by_hand = "\\* at a rate picked by hand; of the others validation rows chose it"
    text += ["", by_hand] if any("\\*" in line[0] for line in lines) else []
    head, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    write_text(path, f"{head}{MARKS[0]}\n" + "\n".join(text) + f"\n{MARKS[1]}" + rest.split(MARKS[1])[1])


def write(board: Board, docs: Path) -> None:
    """Write the page, its plots and the README's table."""
    path = OUT / "overhead.json"
    rows, points = rows_of(board), forgetting(board)
    write_text(docs / "leaderboard.md", page(board, rows, json.loads(path.read_text()) if path.is_file() else {}))
    plots.save_png(points_of(rows), docs / "leaderboard.png", "SST-2 accuracy", "in-context learning kept")
    if len(points) > 1:
        save_kl(points, docs / "leaderboard-kl.png")
    readme(board, rows, docs.parent / "README.md")
