"""Does one curve of the KL to the base explain what every setting forgets? Points, a curve, its errors, a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from leaderboard_table import OURS, Row, figure_kept

FAMILIES = {  # a word in the setting's name -> what its runs have in common; the first that fits counts
    "anchor": "anchor",
    "sdft": "own answers",
    "s3ft": "own answers",
    "kl on": "KL on answers",
    "own few-shot": "few-shot rows",
    "few-shot": "few-shot rows",
    "% ": "general data",
}
PLAIN, FEWEST = "user's answers alone", 8


@dataclass(frozen=True)
class Point:
    """One run. kl: by kind of text, nats; lost: the share of in-context learning that is gone."""

    setting: str
    kind: str
    family: str
    kl: Mapping[str, float]
    lost: float


def family_of(setting: str) -> str:
    return next((family for word, family in FAMILIES.items() if word in setting), PLAIN)


def points_of(rows: Iterable[Row]) -> list[Point]:
    """A point for every run."""
    out = []
    for row in rows:
        for run in row.runs:
            kept = figure_kept(Row(row.task, row.method, row.rate, [run], row.base), OURS)
            if kept is not None:
                kl = {k: run["figures"][f"kl {k}"] for k in ("task", "few-shot")}
                kind = "lora" if row.method.startswith("lora") else "full"
                out.append(Point(row.method, kind, family_of(row.method), kl, 1 - kept))
    return out


def rising(x: Sequence[float], y: Sequence[float], at: Sequence[float]) -> np.ndarray:
    """The values at `at` of the curve that never falls and is nearest to the points (x, y) in squares; between two
    points straight, beyond the ends flat."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(x, kind="stable")
    fit = isotonic_regression(np.asarray(y, dtype=float)[order]).x
    return np.interp(at, np.asarray(x, dtype=float)[order], fit)


def misses(points: Sequence[Point], which: str) -> tuple[dict[str, float], dict[str, float]]:
    """For each setting (what is lost - what the curve of all other settings says, the same for their mean)."""
    curve, flat = {}, {}
    for name in dict.fromkeys(p.setting for p in points):
        mine, others = [p for p in points if p.setting == name], [p for p in points if p.setting != name]
        said = rising([_log(p, which) for p in others], [p.lost for p in others], [_log(p, which) for p in mine])
        lost = fmean(p.lost for p in mine)
        curve[name], flat[name] = lost - float(said.mean()), lost - fmean(p.lost for p in others)
    return curve, flat


def _log(point: Point, which: str) -> float:
    return math.log(max(point.kl[which], 1e-6))


def curve_words(points: Sequence[Point]) -> list[str]:
    """How far settings lie from the curve of the others, and which families lie on one side of it."""
    if len({p.setting for p in points}) < FEWEST:
        return [f"One curve needs at least {FEWEST} settings."]
    out = []
    for which, words in (("task", "the task's answers"), ("few-shot", "few-shot prompts")):
        curve, flat = misses(points, which)
        error, none = (fmean(abs(x) for x in side.values()) for side in (curve, flat))
        out.append(
            f"One rising curve of the KL on {words}, fitted to all other settings, misses what a setting loses by "
            f"{error:.2f} in the mean; their mean alone misses it by {none:.2f}. Families, lost minus the curve: "
            + ", ".join(f"{family} {value:+.2f} ({n})" for family, value, n in _by_family(points, curve))
            + "."
        )
        out.append("")
    return out[:-1]


def _by_family(points: Sequence[Point], misses_: Mapping[str, float]) -> list[tuple[str, float, int]]:
    """(family, mean miss, settings)."""
    groups: dict[str, list[float]] = {}
    for name, miss in misses_.items():
        groups.setdefault(family_of(name), []).append(miss)
    return [(family, fmean(some), len(some)) for family, some in sorted(groups.items())]


def save_plot(points: Sequence[Point], path: Path) -> None:
    """What is lost over the KL on either kind of text, one dot a run; full tuning filled, LoRA open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.4), dpi=120)
    FigureCanvasAgg(figure)
    sides: Any = figure.subplots(1, 2, sharey=True)
    names = sorted({p.family for p in points})
    for axes, which in zip(sides, ("task", "few-shot"), strict=True):
        axes.set(xscale="log", xlabel=f"KL(base || tuned), {which}, nats a token")
        for n, name in enumerate(names):
            for kind, fill in (("full", f"C{n}"), ("lora", "none")):
                some = [p for p in points if (p.family, p.kind) == (name, kind)]
                label = name if kind == "full" else None
                x, y = [max(p.kl[which], 1e-6) for p in some], [p.lost for p in some]
                axes.plot(x, y, "o", markersize=5, color=f"C{n}", markerfacecolor=fill, label=label)
        axes.grid(color="#d8dee4")
    sides[0].set_ylabel("share of in-context learning lost")
    sides[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", bbox_inches="tight")
