"""Which pairs of methods are really trained in `make test`, and what the planner must say to every pair.

All pairs of a hundred methods are some 10,000 runs. Two methods meet only at sites, so what can go wrong between them
is known from the sites they have: one run for every pair of sites, and every pair that works on the same weights.
`make test-long` runs all pairs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, product

from holdfast.errors import PlanError
from holdfast.method import SITES, Method
from holdfast.plan import PHASES, Plan

Pair = tuple[Method, Method]
# Sites that work on the same thing: a step is what the optimizer makes of a gradient; both choose what trains.
SAME = {"update": "grad", "entries": "adapt"}
FELLOWS = 14  # beside so many of those that share with it a method is run: groups of up to 15 are complete


@dataclass
class Chosen:
    """A pair that is trained, the methods in this order, and every reason for it."""

    pair: Pair
    why: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "-".join(m.name for m in self.pair)


def pairs_to_run(methods: Sequence[Method]) -> list[Chosen]:
    """The pairs that stand for all: few, the same at every call, whatever the order of `methods`.

    1. Every pair that shares weights at a site, a wrapper or a phase (`shared`).
    2. For every pair of traits (`traits`: sites, phases, the wrapper) that two methods can bring into one plan, a run.
    3. Every method stands in a pair.
    """
    methods = sorted(methods, key=lambda m: m.name)
    found = possible(methods)
    chosen = {names(p): Chosen(p, [why]) for p, why in _sharing(methods)}
    covered = {t for c in chosen.values() for t in meetings(*c.pair)}
    used = Counter(m.name for c in chosen.values() for m in c.pair)
    missing = {t: found[t] for t in sorted(found) if t not in covered}
    while missing:
        pair, new = _best(missing, used)
        chosen.setdefault(names(pair), Chosen(pair)).why.extend(" meets ".join(t) for t in sorted(new))
        missing = {t: p for t, p in missing.items() if t not in new}
        used.update(m.name for m in pair)
    for a in (m for m in methods if not used[m.name]):
        pair = next((p for b in _next_to(a, methods) for p in orders(a, b)), None)
        if pair:
            chosen.setdefault(names(pair), Chosen(pair)).why.append(f"{a.name} meets another method")
    return sorted(chosen.values(), key=lambda c: c.name)


def _best(missing: dict[tuple[str, str], list[Pair]], used: Counter[str]) -> tuple[Pair, set[tuple[str, str]]]:
    """The pair that covers most of what is missing, then the one whose methods ran least, then the first by name.

    Only pairs of the rarest meeting are looked at: one of them must be taken anyway.
    """
    rarest = min(missing, key=lambda t: (len(missing[t]), t))
    new = {p: {t for t in meetings(*p) if t in missing} for p in missing[rarest]}
    best = min(new, key=lambda p: (-len(new[p]), sum(used[m.name] for m in p), [m.name for m in p]))
    return best, new[best]


def names(pair: Pair) -> frozenset[str]:
    return frozenset(m.name for m in pair)


# ---- what two methods share


def traits(method: Method) -> frozenset[str]:
    """What decides how a method meets others: its sites, the phase of `grad`, and whether it wraps."""
    own = {f"grad ({method.phase})" if s == "grad" else s for s in method.sites()}
    return frozenset(own | {"wrapper"} if method.wraps else own)


def meetings(a: Method, b: Method) -> set[tuple[str, str]]:
    """Every pair of traits that meets when `a` and `b` stand in one plan."""
    return {(min(s, t), max(s, t)) for s, t in product(traits(a), traits(b))}


def possible(methods: Sequence[Method]) -> dict[tuple[str, str], list[Pair]]:
    """Every pair of traits that two of the methods can bring into one plan, with the pairs that do, in order."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in (p[0] for a, b in combinations(methods, 2) if (p := orders(a, b))):
        for t in meetings(*pair):
            found.setdefault(t, []).append(pair)
    return found


@lru_cache(maxsize=1)
def weight_sites() -> tuple[str, ...]:
    """The sites that work on weights: their function takes a parameter's name, or the model to change and return."""

    def first(site: str) -> str:
        return next(iter(list(inspect.signature(getattr(Method, site)).parameters)[1:]), "")

    return tuple(s for s in SITES if first(s) in ("name", "model"))


def acts(method: Method) -> frozenset[str]:
    """The sites at which a method works on weights, by the names of SAME."""
    return frozenset(SAME.get(s, s) for s in method.sites() if s in weight_sites())


def shared(a: Method, b: Method) -> str:
    """What two methods share: weights they both work on, the wrapper, or the phase of `grad`; "" if nothing.

    Told by sites, not by which weights the settings pick: what one leaves alone today another setting picks tomorrow.
    """
    words = [f"weights at {s}" for s in sorted(acts(a) & acts(b))]
    words += ["the wrapper"] * (a.wraps and b.wraps)
    words += sorted(t for t in traits(a) & traits(b) if t.startswith("grad ("))
    return f"both have {', '.join(words)}" if words else ""


def _sharing(methods: Sequence[Method]) -> Iterable[tuple[Pair, str]]:
    """Pairs that share, each method beside at most FELLOWS others of one site: its neighbours in a ring of names."""
    for site in weight_sites():
        ring = [m for m in methods if site in acts(m)]
        for (i, a), (j, b) in combinations(enumerate(ring), 2):
            if min(j - i, len(ring) - (j - i)) <= FELLOWS // 2 and orders(a, b):
                yield orders(a, b)[0], shared(a, b)


def _next_to(method: Method, methods: Sequence[Method]) -> list[Method]:
    """All others, beginning with the one behind it."""
    at = methods.index(method)
    return [*methods[at + 1 :], *methods[:at]]


# ---- what the planner says


def said(pair: Pair) -> PlanError | None:
    """What the planner has against a pair in this order, without a model; None if it may run."""
    try:
        Plan(pair).check_together()
    except PlanError as e:
        return e
    return None


def orders(a: Method, b: Method) -> list[Pair]:
    """The orders in which two methods may stand in one plan; which comes first depends on the names alone.

    Half of the pairs are turned, so that the one first in the alphabet is not always first in the plan.
    """
    a, b = sorted((a, b), key=lambda m: m.name)
    turned = sum(map(ord, a.name + b.name)) % 2
    pairs = [(b, a), (a, b)] if turned else [(a, b), (b, a)]
    return [p for p in pairs if said(p) is None]


def alone(method: Method) -> bool:
    """Whether nothing but a soft prompt trains beside it."""
    return [s.trains for s in method.stages()] == ["prompt"]


def idle(method: Method) -> bool:
    works = set(weight_sites()) - {"grad"} | {"rollouts", "steer"}
    asides = type(method).asides is not Method.asides
    return bool(works & set(method.sites())) or asides or "base_weights" in method.needs


def law(a: Method, b: Method) -> str:
    """Why docs/design.md forbids this order of two methods, "" if it does not: from its words, not from code."""
    sites = set(a.sites()) & set(b.sites())
    if a.wraps and b.wraps:
        return "one wrapper"
    if any(
        "replace" in x.sites() and ("merge" in y.sites() or "base_weights" in y.needs) for x, y in ((a, b), (b, a))
    ):
        return "what is compared with the base's weights must be there"
    if any(m.may_end and "stages" in o.sites() for m, o in ((a, b), (b, a))):
        return "an end of the run would leave stages out"
    if sites & {"stages", "decode"}:
        return f"one owner of {', '.join(sorted(sites & {'stages', 'decode'}))}"
    if any(alone(x) and idle(y) for x, y in ((a, b), (b, a))):
        return "while a prompt trains, weights and rows beside the task rest"
    if "entries" in sites and a.leaves != b.leaves:
        return "what leaves stays or returns"
    if any(x.wraps and "dense" in y.needs for x, y in ((a, b), (b, a))):
        return "an adapter freezes the model's own weights"
    if a.writes & b.writes:
        return f"one writer of {', '.join(sorted(a.writes & b.writes))}"
    if a.copies_rows and b.holds_out:
        return "rows made of the task's come behind what is held out of them"
    if b.name in a.refuses or a.name in b.refuses:
        return "they mean different things"
    if "grad" in sites and PHASES.index(a.phase) > PHASES.index(b.phase):
        return "mask, then rescale, then project"
    return ""
