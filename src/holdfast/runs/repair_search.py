"""The search of a repair: a grid of merges, looked at coarsely, the best again with more items, and one chosen.

Two numbers decide: the task's score, and how far above its floor the ability lies that is nearest to its own (the
margin), by its estimate less a standard error, or less SPARE where that is less: what is chosen because its estimate
is high is partly chosen for luck, and the items of the report do not share it. A candidate that another one beats at
both is off the frontier. The second look takes the frontier of the first one, then the next one behind it, until there
are enough. Chosen is the best task score with a margin of 0 or more; where there is none, the largest margin.

Where WiSE-FT is asked for, the best straight line of the coarse look is bent: the blocks are cut into thirds. Third by
third, the lowest first, a smaller and a larger alpha are looked at, and the best of the three is taken on.

Where there are several tuned models, each and the mean of all is a candidate; then the greedy soup of the paper: from
the best one on, the next best joins the mean where it does not make it worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import PlanError, suggest
from holdfast.method import Method
from holdfast.methods import TaskArithmetic, all_methods
from holdfast.recipe import KEEP_FRAC
from holdfast.runs.repair_heal import SHARES, STEPS
from holdfast.runs.repair_made import ANTIDOTE, GRAFT, REALIGN

SECOND_LOOK = 8  # ours
SOUP = "ModelSoup"
HEAL = "heal"  # no method: `repair_heal` trains the change
MADE = frozenset({HEAL, GRAFT, REALIGN, ANTIDOTE})  # no methods: they look at rows (`repair_made`)
ELSEWHERE = {  # of the same family, and why they are no candidates
    "acu": "its head stands beside a model that stays as it is (holdfast.runs.ridge_head), so no weight is repaired",
    "port": "it moves an adapter to another base (holdfast.sites.porting), and here there is one base",
    "tuco": "it scales the tuning at inference (holdfast.decode.scale_tuning), and no weights come out",
    "emulatedtuning": "it mixes logits at inference (holdfast.decode), and no weights come out",
    "contrast": "it mixes logits at inference (holdfast.decode), and no weights come out",
}
GRID: dict[str, list[dict[str, Any]]] = {  # ours; the papers search the same settings
    "WiSEFT": [{"alpha": n / 10} for n in range(1, 10)],
    "LiNeS": [
        *({"alpha": a} for a in (0.0, 0.2, 0.4, 0.6, 0.8)),
        *({"alpha": a, "beta": b} for a, b in ((0.0, 0.5), (0.0, 0.75), (0.2, 0.4))),
    ],
    "TIES": [{"density": d} for d in (0.05, 0.1, 0.2, 0.4, 0.7)],
    "Breadcrumbs": [{"density": 1.0, "outliers": o} for o in (0.001, 0.01, 0.05, 0.2)],
    "DARE": [{"density": d} for d in (0.1, 0.3, 0.6)],
    "SLERP": [{"t": n / 5} for n in range(1, 5)],
    "SkillGraft": [{"share": s} for s in (1e-4, 1e-3, 0.01, 0.05)],
    "DGHard": [{"strength": 1.0}, {"strength": 1.0, "control": True}],
    "IntruderReduction": [
        *({"mitigation_lambda": x} for x in (0.75, 0.5, 0.25, 0.0)),
        {"mitigation_lambda": 0.0, "control": True},
    ],
    GRAFT: [{"share": s} for s in (1e-3, 0.01)],
    ANTIDOTE: [
        *({"ratio": r} for r in (0.05, 0.1, 0.2)),
        *({"ratio": 0.1, "by": by} for by in ("magnitude", "chance")),  # its controls
    ],
    REALIGN: [{"rate": 0.001}],
    HEAL: [{"steps": STEPS}, *({"steps": STEPS, "share": s} for s in SHARES)],  # one training
}
DEFAULT = ("WiSEFT", "LiNeS", "TIES")
Kept = Mapping[str, Mapping[str, float]]  # of each ability the estimate of the share kept
THIRDS, BEND = 3, 0.2  # ours
SPARE = 0.03  # ours: a suite of few items would keep nothing but the base
GIVEN_BACK = 0.1  # ours: of what the tuning gained


@dataclass(frozen=True)
class Candidate:
    """One merge: a method of the grid and its settings; no settings: the tuned model itself."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> list[Method]:
        """What makes it of the tuned model; of MADE the judge knows."""
        assert self.method not in MADE
        if self.method == SOUP:  # one of TaskArithmetic, since the tuned model itself may be missing in it
            has = tuple(map(float, self.settings["has"]))
            return [TaskArithmetic(models=tuple(self.settings["also"]), weights=has, scale=1 / sum(has))]
        return [all_methods()[self.method](**self.settings)] if self.settings else []

    @property
    def label(self) -> str:
        if self.method == SOUP:
            names = (TUNED.method, *self.settings["also"])
            return " + ".join(n for n, has in zip(names, self.settings["has"], strict=True) if has)
        return " ".join([self.method, *(f"{k} {_words(v)}" for k, v in self.settings.items())])


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    return "/".join(map(_words, value)) if isinstance(value, tuple) else f"{value:g}"


TUNED = Candidate("tuned model")


@dataclass(frozen=True)
class Point:
    """What a candidate scored on some items.

    Attributes:
        candidate: a `Candidate` of a repair, a `Cell` of a comparison.
        value: of the task, higher is better.
        margin: least of (`sure` of the share kept - floor) over the abilities with a floor.
        parts: the parts of the items.
        shown: for the report, plain data.
        likely: the margin of the estimates themselves, without a standard error to spare; None: nobody asked.
    """

    candidate: Any
    value: float
    margin: float
    parts: tuple[str, ...]
    shown: Mapping[str, Any] = field(default_factory=dict)
    likely: float | None = None

    @property
    def meets(self) -> bool:
        return self.margin >= 0

    @property
    def may_meet(self) -> bool:
        return self.estimate >= 0

    @property
    def estimate(self) -> float:
        return self.margin if self.likely is None else self.likely


def candidates(methods: Sequence[str]) -> list[Candidate]:
    """The grid of these methods.

    Raises:
        PlanError: a method has no grid.
    """
    for name in methods:
        if name.lower() in ELSEWHERE:
            what = f"repair cannot try {name}: {ELSEWHERE[name.lower()]}."
            raise PlanError(what, "Leave it out of --method; docs/repair.md shows how it is used.")
        if name not in GRID:
            raise PlanError(f"repair has no grid for the method {name!r}.", suggest(name, list(GRID)))
    return [Candidate(name, settings) for name in dict.fromkeys(methods) for settings in GRID[name]]


def search(
    asked: Sequence[Candidate],
    coarse: Callable[[Candidate], Point],
    fine: Callable[[Candidate], Point],
    also: Sequence[str] = (),
    pick: Callable[[Sequence[Point]], Point] | None = None,
) -> tuple[list[Point], Point]:
    """(all points, the coarse ones first; the chosen one, which has had the second look).

    also: further tuned models. pick: chooses, by default `choose`.

    The tuned model gets the second look in any case: where nothing is lost, nothing is repaired.
    """
    first = [coarse(c) for c in asked]
    first += _bent([p for p in first if p.candidate.method == "WiSEFT"], coarse)
    first += _soups(also, coarse)
    second = [fine(TUNED), *(fine(p.candidate) for p in best(first, SECOND_LOOK))]
    return [*first, *second], (pick or choose)(second)


def _bent(lines: Sequence[Point], coarse: Callable[[Candidate], Point]) -> list[Point]:
    """Coarse looks at WiSE-FT with an alpha for each third of the blocks, from the best one of these."""
    if not lines:
        return []
    looked, now = [], choose(lines)
    alpha = now.candidate.settings["alpha"]
    for third in range(THIRDS):
        parts = now.candidate.settings.get("parts", (alpha,) * THIRDS)
        near = {min(1.0, max(0.0, round(alpha + d, 6))) for d in (-BEND, BEND)} - {alpha}
        found = [
            coarse(Candidate("WiSEFT", {"alpha": alpha, "parts": (*parts[:third], a, *parts[third + 1 :])}))
            for a in sorted(near)
        ]
        looked, now = looked + found, choose([now, *found])
    return looked


def _soups(also: Sequence[str], coarse: Callable[[Candidate], Point]) -> list[Point]:
    """Coarse looks at each of several tuned models, at the mean of all, and at those of the greedy soup."""
    if not also:
        return []
    number = 1 + len(also)
    looked: dict[tuple[int, ...], Point] = {}

    def look(members: set[int]) -> Point:
        has = tuple(int(n in members) for n in range(number))
        if has not in looked:
            looked[has] = coarse(TUNED if members == {0} else Candidate(SOUP, {"also": tuple(also), "has": has}))
        return looked[has]

    alone = [look({n}) for n in range(number)]
    look(set(range(number)))
    left, order = list(range(number)), []
    while left:  # the best first; of equals the one that was named first
        order.append(next(n for n in left if alone[n] == choose([alone[n] for n in left])))
        left.remove(order[-1])
    soup = {order[0]}
    for n in order[1:]:
        if choose([look({*soup, n}), look(soup)]) == look({*soup, n}):  # as good is good enough
            soup.add(n)
    return [p for p in looked.values() if p.candidate != TUNED]


def sure(kept: Mapping[str, float]) -> float:
    """An estimate less its standard error, of which a 95 % interval has about four, and less SPARE at most."""
    return kept["value"] - min(SPARE, (kept["high"] - kept["low"]) / 4)


def margins_of(kept: Kept, floors: Mapping[str, float], spare: bool = True) -> list[float]:
    """How far each ability with a floor lies above it; what the base does not have is not in `kept`.

    spare: less a standard error (`sure`).
    """
    return [(sure(kept[n]) if spare else kept[n]["value"]) - floor for n, floor in floors.items() if n in kept]


def losses_of(kept: Kept, floors: Mapping[str, float]) -> list[float]:
    """Of the abilities without a floor those that are shown below KEEP_FRAC, and by how much (below 0)."""
    return [kept[n]["high"] - KEEP_FRAC for n in kept if n not in floors and kept[n]["high"] < KEEP_FRAC]


def choose(points: Sequence[Point]) -> Point:
    """The best task score that meets the bound, else the nearest to it."""
    meeting = [p for p in points if p.meets]
    if meeting:
        return max(meeting, key=lambda p: (p.value, p.margin))
    return max(points, key=lambda p: (p.margin, p.value))


def falls_short(chosen: Point, tuned: float, base: float) -> bool:
    """Whether it misses the bound, or meets it by giving back much of what the task gained from `base` to `tuned`."""
    return not chosen.meets or gives_back(chosen, tuned, base)


def gives_back(chosen: Point, tuned: float, base: float) -> bool:
    """Whether it is without much of what the task gained from `base` to `tuned`."""
    return tuned - chosen.value > GIVEN_BACK * max(0.0, tuned - base)


def affordable(points: Sequence[Point], tuned: float, base: float) -> Point:
    """`choose`; where the bound is met surely only by giving back much, the surest that may meet it and does not.

    Where all that may meet it gives back much: the best task score, unless the sure end is nearly as good.

    A sure bound of 0.97 on few items asks for 1.00, which hardly anything reaches: on sums of two numbers it cost 75
    points of accuracy for 0.02 of in-context ability, by an estimate that knows it to 0.03.
    """
    best, may = choose(points), [p for p in points if p.may_meet]
    if not may or not falls_short(best, tuned, base):
        return best
    cheap = [p for p in may if not gives_back(p, tuned, base)]
    if cheap:
        return max(cheap, key=lambda p: (p.margin, p.value))
    top = max(may, key=lambda p: (p.value, p.margin))
    return best if best.meets and top.value - best.value <= GIVEN_BACK * (tuned - base) else top


def choose_nearest(points: Sequence[Point]) -> Point:
    """`choose` where the task is closeness to the tuned model: of a healing only the least share that meets the bound.

    The training has seen the prompts, so its closeness there does not tell shares apart; yet the smaller one is nearer
    to the tuned model, as a share of 0 is that model.
    """
    healed = [p for p in points if p.candidate.method == HEAL]
    least = min((p for p in healed if p.meets), key=lambda p: p.candidate.settings.get("share", 1.0), default=None)
    return choose(points if least is None else [p for p in points if p not in healed or p is least])


def best(points: Sequence[Point], most: int) -> list[Point]:
    """The frontier, then the frontier of the rest, and so on, at most so many; of each the nearest to the bound."""
    left, out = list(points), []
    while left and len(out) < most:
        layer = frontier(left)
        out += sorted(layer, key=lambda p: abs(p.margin))
        left = [p for p in left if p not in layer]
    return out[:most]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: at least as good at both, and better at one."""

    def beats(a: Point, b: Point) -> bool:
        return a.value >= b.value and a.margin >= b.margin and (a.value, a.margin) != (b.value, b.margin)

    return [p for p in points if not any(beats(q, p) for q in points)]
