"""A bound on the anchors' KL that is held in training, and what that KL says about ability. Resumable: a file a run.

    python benchmarks/steering.py run --minutes 30                       # what is missing; starts no run later
    python benchmarks/steering.py run --tasks sst2 rte --only lora --only "hold 0.1"
    python benchmarks/steering.py table                                  # two tables in Markdown

Runs of 60 steps as in the leaderboard, on its tasks: plain LoRA, the default plan at its own rate, and the default
plan with `ICLAnchor(hold=...)` at the same rate. All go through one process and are asked about the task and about
few-shot prompts of held-out tasks. Three cheap signals are held against what is kept there: the KL that the anchors
gave in the last steps, and, on few-shot prompts of anchor tasks once the run is over, the KL and the rise of the
answers' loss. At three times the rate, where the default breaks a bound of 0.97, `gentler x3` looks every 15 steps
and, below the bound, goes back to the last weights above it and goes on at half the rate.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from leaderboard_cell import Lab, Material, divergence, made, material, measure, train_methods
from leaderboard_cells import BASE, Cell, Data, clock_after, in_turn, options
from leaderboard_plans import DEFAULT, OUT, Size
from leaderboard_table import NAMES, OURS, Row, grouped

FOLDER = OUT / "steering"
TASKS = ("sst2", "rte", "tickets", "agnews")
FAST, BOUND, EVERY = 3, 0.97, 15  # times the rate; share of in-context; steps between two looks
HOLDS = (0.1, 0.2, 0.4)  # nats per token
SIZE = Size(suites={OURS: 24}, more={}, divergence=20, shared=20)
KL, WEIGHT = "ICLAnchor/kl", "ICLAnchor/weight"
LAST, PROMPTS = 8, 16  # looks of a run that its live KL is a mean of; prompts that are looked at behind it
SIGNALS = {
    "live": f"KL on anchors, last {LAST} looks of training",
    "after": f"KL on {PROMPTS} anchor prompts, after training",
    "labels": f"rise of the answers' loss on {PROMPTS} anchor prompts",
}


@dataclass(frozen=True)
class Setting:
    """One way to tune."""

    name: str
    rate: float
    methods: Callable[[], Sequence[Any]]
    gentler: bool = False


def settings() -> dict[str, Setting]:
    from holdfast import methods as M
    from holdfast.runs.job import default_plan

    def anchored(**hold: float) -> list[Any]:
        return [replace(m, **hold) if isinstance(m, M.ICLAnchor) else m for m in default_plan()]

    known = [
        Setting("lora", 1e-3, lambda: [M.LoRA()]),
        Setting("default", DEFAULT, lambda: anchored(hold=1.0, hold_rate=0.0)),  # the weight is fixed, the KL shown
        *(Setting(f"hold {b:g}", DEFAULT, lambda b=b: anchored(hold=b)) for b in HOLDS),
        Setting(f"default x{FAST}", FAST * DEFAULT, lambda: anchored(hold=1.0, hold_rate=0.0)),
        Setting(f"hold 0.1 x{FAST}", FAST * DEFAULT, lambda: anchored(hold=0.1)),
        Setting(f"gentler x{FAST}", FAST * DEFAULT, lambda: anchored(hold=1.0, hold_rate=0.0), gentler=True),
    ]
    return {s.name: s for s in known}


class Gentler:
    """In place of a `Watch`: what breaks the bound is undone, and what follows goes half as fast."""

    every, keep_best = EVERY, False

    def __init__(self, kept: Callable[[Any], float]):
        self.kept, self.factor, self.looks = kept, 1.0, []

    def begin(self, session: Any, *_: Any) -> None:
        self.good, plain = self._weights(session), session.begin_step

        def begin_step(step: int, optimizer: Any) -> None:
            plain(step, optimizer)
            for group in optimizer.param_groups:  # the schedule sets the whole rate again after each step
                group["lr"] *= self.factor

        session.begin_step = begin_step

    def after(self, step: int, of: int, session: Any, *_: Any) -> None:
        import torch

        if step % EVERY and step != of:
            return
        with session.between_steps():
            share = self.kept(session.model)
        self.looks.append([step, round(share, 4), self.factor])
        if share >= BOUND:
            self.good = self._weights(session)
            return
        self.factor /= 2
        with torch.no_grad():
            for name, p in session.params.items():
                p.copy_(self.good[name])

    def _weights(self, session: Any) -> dict[str, Any]:
        return {name: p.detach().clone() for name, p in session.params.items()}


class Bench:
    """What all runs share. lab: its model, its folder of data and how much is asked."""

    def __init__(self, lab: Lab):
        from holdfast import models

        self.lab = lab
        self.base, self.tokenizer = models.load(lab.model)
        self._rows: dict[str, Material] = {}

    def rows(self, task: str) -> Material:
        """Of a task; nothing is chosen here, so no rows are asked for that."""
        if task not in self._rows:
            self._rows[task] = replace(material(task, self.lab, self.tokenizer), validation=())
        return self._rows[task]

    @cached_property
    def prompts(self) -> dict[str, Sequence[Any]]:
        """Few-shot prompts of anchor tasks that no run trains on: all tokens of them, and their answers alone."""
        from holdfast.methods import ICLAnchor
        from holdfast.services import Context

        ctx = Context(self.base, self.tokenizer)
        return {on: ICLAnchor(pool=PROMPTS, seed=1, on=on).asides(ctx) for on in ("all", "answers")}

    @cached_property
    def probe(self) -> Any:
        """Few-shot prompts of held-out tasks, 8 a task: a third of those that are reported."""
        from holdfast.measure.probe import Ask
        from holdfast.measure.suites import build

        return build(OURS, Ask(self.tokenizer, self.lab.size.shots, 8))

    @cached_property
    def probed(self) -> float:
        return self._right(self.base)

    def _right(self, model: Any) -> float:
        from holdfast.measure.asking import score_suite

        found = score_suite(model, self.tokenizer, self.probe)
        return fmean(fmean(i["correct"] for i in t["items"]) for t in found["tasks"])

    def kept(self, model: Any) -> float:
        """Share of the base's in-context score, chance aside."""
        return self._right(model) / self.probed

    def labels(self, model: Any) -> float:
        """Mean loss of the demonstrations' answers."""
        import torch

        from holdfast.engine.base import batches
        from holdfast.engine.forward import forward

        found = []
        with torch.no_grad():
            for _, batch in batches(self.prompts["answers"], 1024):
                rows, logits = forward(model, batch)
                found.append(torch.nn.functional.cross_entropy(logits.float(), rows.target, reduction="none"))
        return float(torch.cat(found).mean())

    def run(self, cell: Cell, setting: Setting | None) -> Data:
        """Train and measure a cell; no setting: measure the base."""
        start, rows = time.perf_counter(), self.rows(cell.task)
        facts: Data = {"task": cell.task, "method": cell.method, "rate": cell.rate, "seed": cell.seed}
        model, cost, shown, signals = self.base, {}, {}, {}
        if setting:
            methods = setting.methods()
            facts |= {"plan": f"{methods}", "steps": self.lab.size.steps, "batch": self.lab.size.batch}
            watch = Gentler(self.kept) if setting.gentler else None
            model = copy.deepcopy(self.base)
            trained = train_methods(
                methods, cell, self.lab, model, self.tokenizer, rows, keep=(KL, WEIGHT), watch=watch
            )
            facts |= {"looks": watch.looks} if watch else {}
            model, shown = trained.model, trained.facts.pop("shown")
            facts |= trained.facts
            cost["train_seconds"] = round(time.perf_counter() - start, 1)
            signals = {
                **({"live": fmean(x for _, x in shown[KL][-LAST:])} if shown[KL] else {}),
                "after": divergence(self.base, model, self.prompts["all"]),
                "labels": self.labels(model) - self.labels(self.base),
            }
        found = measure(cell, self.lab, model, self.tokenizer, rows)
        cost |= {"measure_seconds": found.pop("measure_seconds"), "seconds": round(time.perf_counter() - start, 1)}
        signals = {name: round(x, 6) for name, x in signals.items()}
        return {**facts, "signals": signals, "shown": shown, "cost": cost, "made": made(), **found}


# ---- many runs


def cells(tasks: Sequence[str], seeds: int, only: Sequence[str] = ()) -> Iterator[tuple[Cell, Setting | None]]:
    """All of them: the bases, then every setting on every task with the first seed, then with the next.

    only: these settings, and the bases they are held against.
    """
    yield from ((Cell(task, BASE), None) for task in tasks)
    chosen = [s for s in settings().values() if s.name in only or not only]
    for seed in range(seeds):
        yield from ((Cell(task, s.name, s.rate, seed), s) for task in tasks for s in chosen)


def drive(bench: Bench, folder: Path, todo: Sequence[tuple[Cell, Setting | None]], until: float) -> Mapping[str, str]:
    """Run what is to do until the clock shows `until`; returns what failed and why."""
    made_by = ((f"{cell}", folder / cell.file, partial(bench.run, cell, setting)) for cell, setting in todo)
    return in_turn(made_by, until)


# ---- tables


def rows_of(folder: Path) -> list[Row]:
    """What was measured, by task and setting, where the base was."""
    runs = grouped(json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*/*.json")))
    names = list(settings())
    rows = [
        Row(task, method, rate, found, runs[task, BASE, None][0])
        for (task, method, rate), found in runs.items()
        if method in names and (task, BASE, None) in runs
    ]
    return sorted(rows, key=lambda r: (TASKS.index(r.task), names.index(r.method)))


def results(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of the first table: what was learnt and kept, and where the weight went."""
    yield "| task | setting | rate | seeds | accuracy | in-context kept | KL in the last steps | weight | seconds |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for r in rows:
        weights = [[x for _, x in run["shown"][WEIGHT]] for run in r.runs]
        said = ", ".join(f"{w[-1]:.2g} ({min(w):.2g} to {max(w):.2g})" for w in weights if w) or "none"
        live = [run["signals"]["live"] for run in r.runs if "live" in run["signals"]]
        seconds = fmean(run["cost"]["train_seconds"] for run in r.runs)
        yield (
            f"| {NAMES[r.task]} | {r.method} | {r.rate:g} | {len(r.runs)} | {_interval(r.accuracy())} "
            f"| {_interval(r.kept(OURS))} | {f'{fmean(live):.3f}' if live else 'none'} | {said} | {seconds:.0f} |"
        )


@dataclass(frozen=True)
class Point:
    """A run: its signals and the share kept."""

    task: str
    method: str
    seed: int
    signals: Mapping[str, float]
    kept: float


def points(rows: Sequence[Row]) -> list[Point]:
    """Every run for itself, where something can be lost."""
    found = [(run, replace(r, runs=[run]).kept(OURS), r) for r in rows for run in r.runs]
    return [Point(r.task, r.method, run["seed"], run["signals"], kept.value) for run, kept, r in found if kept]


def predicted(signal: Any, c: Any) -> Any:
    """kept = exp(-signal / c), of numbers or arrays: all of it at 0, the less the further away."""
    return np.exp(-np.maximum(signal, 0.0) / c)


def fit(pairs: Sequence[tuple[float, float]]) -> float:
    """c by least squares of what is kept, out of 601 from 1e-4 to 100: (signal, kept) of every run."""
    signals, kept = np.array(pairs).T
    tries = np.logspace(-4, 2, 601)
    return float(tries[((predicted(signals, tries[:, None]) - kept) ** 2).sum(1).argmin()])


def errors(found: Sequence[Point], signal: str) -> tuple[list[float], list[float]]:
    """Of each run, how far what is kept lies from a fit of the other tasks' runs, and from their mean."""
    curve, flat = [], []
    for p in found:
        others = [(q.signals[signal], q.kept) for q in found if q.task != p.task]
        curve.append(abs(float(predicted(p.signals[signal], fit(others))) - p.kept))
        flat.append(abs(fmean(kept for _, kept in others) - p.kept))
    return curve, flat


def predictions(found: Sequence[Point]) -> Iterator[str]:
    """Lines of the second table: how well each signal predicts what is kept, with plain LoRA and without."""
    from scipy.stats import spearmanr

    yield "| signal | runs | n | Spearman | c | error, other tasks' c | error, other tasks' mean |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for signal, words in SIGNALS.items():
        for which in ("all", "with anchors"):
            some = [p for p in found if signal in p.signals and (which == "all" or p.method != "lora")]
            line = f"| {words} | {which} | {len(some)} |"
            if len({p.task for p in some}) < 2 or len({p.kept for p in some}) < 2:
                yield f"{line} too few | | | |"
                continue
            pairs = [(p.signals[signal], p.kept) for p in some]
            curve, flat = errors(some, signal)
            signals, kept = zip(*pairs, strict=True)
            rank: Any = spearmanr(signals, kept)
            yield f"{line} {rank.statistic:.2f} | {fit(pairs):.3g} | {fmean(curve):.3f} | {fmean(flat):.3f} |"


def every(found: Sequence[Point]) -> Iterator[str]:
    """Lines of the points themselves."""
    yield f"| task | setting | seed | {' | '.join(SIGNALS)} | in-context kept |"
    yield f"|---|---|--:|{'--:|' * (len(SIGNALS) + 1)}"
    for p in found:
        values = [f"{p.signals[s]:.3f}" if s in p.signals else "none" for s in SIGNALS]
        yield f"| {NAMES[p.task]} | {p.method} | {p.seed} | {' | '.join(values)} | {p.kept:.3f} |"


def table(folder: Path) -> str:
    rows = rows_of(folder)
    if not rows:
        raise SystemExit(f"There is no measured run in {folder}.")
    found = points(rows)
    note = "`c` of kept = exp(-signal / c) from all runs; errors are mean absolute ones of runs of a task left out."
    parts = (results(rows), ["Live signal against full measurement."], predictions(found), [note], every(found))
    return "\n\n".join("\n".join(part) for part in parts)


def _interval(x: Any) -> str:
    return "not measurable" if x is None else f"{x.value:.3f} ({x.low:.3f} to {x.high:.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, "table", FOLDER, "text/<task> and icl")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this setting; may be repeated")
    args = parser.parse_args(argv)
    if args.what == "table":
        print(table(args.folder))
        return 0
    until = clock_after(args.minutes)
    if unknown := [n for n in args.only if n not in settings()]:
        raise SystemExit(f"There is no setting {unknown[0]!r}. Known: {', '.join(settings())}.")
    todo = [x for x in cells(args.tasks, args.seeds, args.only) if not (args.folder / x[0].file).is_file()]
    print(f"{len(todo)} runs are missing.", flush=True)
    failed = drive(Bench(Lab(args.shared, args.model, SIZE)), args.folder, todo, until) if todo else {}
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
