"""False alarms and power in worlds whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruler_sections.lab import ALPHA, KEEP, Data, Lab

# accuracy of SmolLM2-135M-Instruct on the 20 held-out tasks, and chance (benchmarks/results, 24 items each)
BASES = (
    *((0.67, 0.0), (0.25, 0.0), (0.25, 0.0), (0.75, 0.10), (0.88, 0.0), (0.42, 0.0), (0.58, 0.0), (0.04, 0.0)),
    *((0.83, 0.0), (0.83, 0.0), (0.83, 0.0), (0.97, 0.0), (0.58, 0.0), (0.62, 0.0), (0.88, 0.0), (0.97, 0.5)),
    *((0.67, 0.0), (0.71, 0.25), (0.62, 0.5), (0.46, 0.0)),
)
SHAPES = ((20, 48), (4, 12), (5, 6), (2, 120), (6, 6), (10, 24), (4, 42))  # tasks x items of the default suites
DISCORDANCES, LIMITS, LOSSES = (0.05, 0.10, 0.20), (12, 24, 48, 96), range(1, 16)


@dataclass(frozen=True)
class World:
    """One ability with a known truth: `limit` items of each task, P(item changes), true loss of each task."""

    tasks: int
    limit: int
    discordance: float
    loss: float = 0.0
    relative: bool = False  # the loss is a share of what the base has above chance

    def cells(self) -> np.ndarray:
        """(T, 4) probabilities of (base, tuned) = 11, 10, 01, 00. No task falls below chance."""
        return np.array([self._cell(*BASES[n % len(BASES)]) for n in range(self.tasks)])

    def _cell(self, p: float, chance: float) -> tuple[float, float, float, float]:
        lost = self.loss * (p - chance) if self.relative else min(self.loss, p - chance)
        gain = max(0.0, min((self.discordance - lost) / 2, 1 - p, p - lost))
        return p - gain - lost, gain + lost, gain, 1 - p - gain

    @property
    def chance(self) -> np.ndarray:
        return np.array([BASES[n % len(BASES)][1] for n in range(self.tasks)])

    def draw(self, reps: int, rng: np.random.Generator) -> np.ndarray:
        """(reps, T, 4) counts of items."""
        return rng.multinomial(self.limit, self.cells(), size=(reps, self.tasks))

    def truth(self) -> Data:
        """What is true on average over the tasks: changed items, loss in points and as a share of the ability."""
        _, lost, gained, _ = cells = self.cells().T
        above = (cells[0] + lost - self.chance) / (1 - self.chance)
        share = float(((lost - gained) / (1 - self.chance)).sum() / above.sum())
        return {"changed": float((lost + gained).mean()), "loss": float((lost - gained).mean()), "share": share}


def judge(counts: np.ndarray, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The verdict of `compare.ability` on (R, T, 4) counts: (measurable, p_loss, lower bound of the share) of each.

    The bootstrap's distribution is taken as normal with the bootstrap's own covariance, so that its quantiles need no
    draws: p_loss is a normal tail, and the bound of the ratio is Fieller's. `simulated` reports how often the status
    equals that of `compare.abilities` with its 4000 draws.
    """
    n = counts.sum(-1)
    p, d = (counts[..., 0] + counts[..., 1]) / n, (counts[..., 2] - counts[..., 1]) / n
    weight = _measurable(p, n, chance) / (1 - chance)
    many = np.maximum((weight > 0).sum(-1), 1)
    var_d = (counts[..., 1] + counts[..., 2]) / n - d * d
    cov = -counts[..., 1] / n - p * d  # base * difference is -1 where an item was lost
    b = (weight * (p - chance)).sum(-1) / many
    diff = (weight * d).sum(-1) / many
    vb, vd, c = ((weight**2 * v / (n - 1)).sum(-1) / many**2 for v in (p * (1 - p), var_d, cov))
    known = (weight > 0).any(-1) & (b >= 2 * np.sqrt(vb)) & (b > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        from scipy.special import ndtr, ndtri

        p_loss = np.where(vd > 0, ndtr(diff / np.sqrt(vd)), (diff >= 0).astype(float))
        p_loss = np.maximum(p_loss, sign_test(counts, weight > 0))
        z2 = float(ndtri(1 - ALPHA)) ** 2
        a2, a1, a0 = b * b - z2 * vb, b * diff - z2 * c, diff * diff - z2 * vd
        lower = (a1 - np.sqrt(np.maximum(a1 * a1 - a2 * a0, 0))) / a2
    return known, p_loss, np.where(known, 1 + lower, np.nan), np.where(known, 1 + diff / np.where(b > 0, b, 1), np.nan)


def _measurable(p: np.ndarray, n: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """`stats.measurable` for 0/1 items without clusters."""
    wilson = (p + 2 / n - 2 * np.sqrt(p * (1 - p) / n + 1 / n**2)) / (1 + 4 / n)
    return (wilson > chance) & (p > chance) & (p - chance >= 2 * np.sqrt(p * (1 - p) / (n - 1)))


def sign_test(counts: np.ndarray, used: np.ndarray) -> np.ndarray:
    """(R,) one-sided p of the exact sign test on the items of all measurable tasks: "lost" needs it too."""
    from scipy.special import bdtr

    lost, gained = ((counts[..., k] * used).sum(-1) for k in (1, 2))
    return bdtr(gained, lost + gained, 0.5)


def bootstrapped(counts: np.ndarray, chance: np.ndarray, p_loss: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """p_loss of `judge`, drawn as `stats.macro_draws` does where it is small: few items have no normal tail."""
    out, n = p_loss.copy(), counts.sum(-1)
    p = (counts[..., 0] + counts[..., 1]) / n
    weight = _measurable(p, n, chance) / (1 - chance)
    for rep in np.flatnonzero((p_loss < ALPHA) & (weight > 0).any(-1)):
        used = weight[rep] > 0
        row, size, w = counts[rep, used], n[rep, used], weight[rep, used]
        cells = np.stack([row[:, 1], row[:, 2], row[:, 0] + row[:, 3]], axis=1) / size[:, None]
        drawn = rng.multinomial(size, cells, size=(4000, used.sum()))
        d, at = (drawn[..., 1] - drawn[..., 0]) / size, cells[:, 1] - cells[:, 0]
        total = (w * (at + (d - at) * np.sqrt(size / (size - 1)))).sum(1)
        out[rep] = (1 + (total >= -1e-12).sum()) / 4001
    return np.maximum(out, sign_test(counts, weight > 0))


def statuses(verdicts: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
    """(R, A) status of abilities judged together, Holm as in `compare.abilities`."""
    known, p, lower, kept = (np.stack(x, axis=1) for x in zip(*verdicts, strict=True))
    order = np.argsort(np.where(known, p, np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    raw = np.take_along_axis(np.where(known, p, 0.0), order, 1)
    scaled = np.minimum(1.0, (known.sum(1, keepdims=True) - np.arange(p.shape[1])) * raw)
    adjusted = np.take_along_axis(np.maximum.accumulate(scaled, axis=1), rank, 1)
    out = np.where(lower > KEEP, "kept", "unclear")
    out = np.where((adjusted < ALPHA) & (kept < KEEP) & (lower <= KEEP), "lost", out)
    return np.where(known, out, "not measurable")


def simulated(lab: Lab) -> Data:
    """False alarms and power on made-up items whose truth is known."""
    rng, reps = np.random.default_rng(0), lab.size(10_000, 200)
    limits, losses = lab.size(LIMITS, (12,)), lab.size(LOSSES, (0, 10))
    alone = [_rates([World(20, 48, d)], reps, rng) for d in DISCORDANCES]
    joint = [_rates([World(*s, d) for s in SHAPES], lab.size(4000, 50), rng) for d in DISCORDANCES]
    edge = [_rates([World(20, 48, d, 1 - KEEP, True)], reps, rng) for d in DISCORDANCES]
    curve = [
        {"limit": n, **_rates([World(20, n, d, x / 100)], lab.size(2000, 100), rng)}
        for n in limits
        for d in DISCORDANCES[1:]
        for x in losses
    ]
    return {
        "repetitions": reps,
        "joint_repetitions": lab.size(4000, 50),
        "curve_repetitions": lab.size(2000, 100),
        "shapes": SHAPES,
        "alone": alone,
        "joint": joint,
        "edge": edge,
        "curve": curve,
        "direct": [_direct(d, lab.size(15, 2), rng) for d in DISCORDANCES[1:]],
        "sight": [_sight(n, curve, rng) for n in limits],
    }


def _rates(worlds: Sequence[World], reps: int, rng: np.random.Generator) -> Data:
    """Shares of repetitions in which any ability is lost, and in which the first one is kept."""
    drawn = [w.draw(reps, rng) for w in worlds]
    verdicts = [judge(c, w.chance) for c, w in zip(drawn, worlds, strict=True)]
    if len(worlds) > 1:  # small ones among them
        parts = zip(verdicts, drawn, worlds, strict=True)
        verdicts = [(v[0], bootstrapped(c, w.chance, v[1], rng), *v[2:]) for v, c, w in parts]
    found = statuses(verdicts)
    return {
        "discordance": worlds[0].discordance,
        "asked_loss": worlds[0].loss,
        **worlds[0].truth(),
        "any_lost": float((found == "lost").any(1).mean()),
        "kept": float((found[:, 0] == "kept").mean()),
        "unclear": float((found[:, 0] == "unclear").mean()),
        "each_lost": [float(x) for x in (found == "lost").mean(0)],
    }


def measurement(counts: np.ndarray, chance: np.ndarray, name: str = "made up") -> tuple[Data, Data]:
    """(T, 4) counts as two measurements of the same items."""
    sides = []
    for marks in ((1, 1, 0, 0), (1, 0, 1, 0)):
        scores = [np.repeat(marks, row) for row in counts]
        sides.append(as_measurement(name, {str(n): s for n, s in enumerate(scores)}, dict(enumerate(chance))))
    return sides[0], sides[1]


def as_measurement(name: str, tasks: Mapping[str, Sequence[int]], chance: Mapping[Any, float]) -> Data:
    """Marks by task in the shape of `score_suite`."""
    known = {str(k): float(v) for k, v in chance.items()}
    return {
        "suite": name,
        "tasks": [
            {
                "name": task,
                "version": 1,
                "chance": known[task],
                "metric": "exact",
                "items": [{"id": f"{task}/{n}", "cluster": "", "correct": int(x)} for n, x in enumerate(marks)],
            }
            for task, marks in tasks.items()
        ],
    }


def _direct(discordance: float, reps: int, rng: np.random.Generator) -> Data:
    """The quick verdict beside `compare.abilities` itself, on all abilities; a third of the repetitions has a loss."""
    from holdfast.measure.compare import abilities

    same, total, alarms, calm = 0, 0, 0, 0
    for rep in range(reps):
        worlds = [World(*s, discordance, 0.0 if rep % 3 else 0.06) for s in SHAPES]
        drawn = [w.draw(1, rng) for w in worlds]
        quick = statuses([judge(c, w.chance) for c, w in zip(drawn, worlds, strict=True)])[0]
        pairs = [measurement(c[0], w.chance, f"a{n}") for n, (c, w) in enumerate(zip(drawn, worlds, strict=True))]
        parts = abilities([p[0] for p in pairs], [p[1] for p in pairs], {}, KEEP)
        same += sum(p["status"] == q for p, q in zip(parts, quick, strict=True))
        total, calm = total + len(parts), calm + (rep % 3 > 0)
        alarms += rep % 3 > 0 and any(p["status"] == "lost" for p in parts)
    return {"discordance": discordance, "verdicts": total, "same": same, "without_loss": calm, "alarms": int(alarms)}


def _sight(limit: int, curve: Sequence[Data], rng: np.random.Generator) -> Data:
    """What `measure.sight` promises, beside the simulated loss that is called lost nine times in ten."""
    from holdfast.measure.sight import DISCORDANT, can_see

    world = World(20, limit, DISCORDANT)
    seen = can_see(measurement(world.draw(1, rng)[0], world.chance)[0], KEEP)
    line = [c for c in curve if c["limit"] == limit and c["discordance"] == DISCORDANT]
    rates, losses = [c["any_lost"] for c in line], [c["loss"] for c in line]
    found = float(np.interp(0.9, np.maximum.accumulate(rates), losses)) if max(rates) >= 0.9 else None
    return {"limit": limit, "promised": seen and seen.loss, "share": seen and seen.share, "simulated": found}
