"""Contract rule 13: every ordered pair of methods trains, or is refused by name. `pairs` says which pairs are run."""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import ClassVar

import pytest
import torch

from cases import BY_NAME, CASES, late, run
from holdfast import methods as hf
from holdfast.errors import HoldfastError, PlanError
from holdfast.method import SITES, Method
from holdfast.plan import PHASES, Plan
from pairs import FELLOWS, acts, law, meetings, orders, pairs_to_run, possible, said, shared, traits, weight_sites

METHODS = [c.method for c in CASES]
CHOSEN = pairs_to_run(METHODS)


# ---- the planner decides on every pair; nothing is trained


def wrong(pair):
    """What is wrong with the planner's decision on one ordered pair, "" if nothing is."""
    why, error = law(*pair), said(pair)
    name = " before ".join(m.name for m in pair)
    if why and not error:
        return f"{name}: may run, but {why}"
    if error and not why:
        return f"{name}: refused, but nothing forbids it: {error.what}"
    if error and not (error.cure and all(m.name in error.what for m in pair)):
        return f"{name}: refused without naming both or a cure: {error}"
    return ""


def test_13_the_planner_decides_on_every_pair():
    assert [w for w in map(wrong, permutations(METHODS, 2)) if w] == []


@dataclass(frozen=True, kw_only=True)
class Friend(Method):
    """Fits with everything but Foe, and does not say so."""


@dataclass(frozen=True, kw_only=True)
class Foe(Method):
    refuses: ClassVar = {"Friend": "it is a test."}


def test_13_a_wrong_decision_is_seen(monkeypatch):
    assert wrong((Friend(), Foe())) == wrong((Foe(), Friend())) == ""
    monkeypatch.setattr(Plan, "_check_meaning", lambda self: None)
    assert wrong((Friend(), Foe())) == "Friend before Foe: may run, but they mean different things"

    def refuse(self):
        raise PlanError("Friend does not want to.", "")

    monkeypatch.setattr(Plan, "_check_meaning", refuse)
    assert wrong((Friend(), Foe())).startswith("Friend before Foe: refused without naming both")
    assert "refused, but nothing forbids it" in wrong((Friend(), BY_NAME["DFT"].method))


# ---- the chosen pairs train


def finite_run(pair, model, tokenizer, rows):
    """Train a pair for four steps, or until one ends the run: everything finite, and neither without effect."""
    result = run(pair, model, tokenizer, rows, 4)
    assert len(result.log.loss) == 4 or (result.log.ended and any("steer" in m.sites() for m in pair))
    assert all(torch.isfinite(torch.tensor(list(parts.values()))).all() for _, parts in result.log.loss)
    assert all(w.isfinite().all() for w in result.weights.values())
    assert all(result.session.effects[m.name] for m in pair)


def quick(chosen):
    """A pair of two methods that stand for others; all the chosen ones are long tests."""
    marks = [mark for m in chosen.pair for mark in late(m.name)][:1]
    return pytest.param(chosen, id=chosen.name, marks=marks)


@pytest.mark.parametrize("chosen", map(quick, CHOSEN))
def test_13_a_chosen_pair_trains(chosen, tiny_model, tokenizer, rows):
    finite_run(chosen.pair, tiny_model(), tokenizer, rows)


@pytest.mark.long
@pytest.mark.parametrize("first", METHODS, ids=lambda m: m.name)
def test_13_all_pairs_train_or_are_refused(first, tiny_model, tokenizer, rows):
    """Every pair that begins with one method."""
    failures = {}
    for second in METHODS:
        pair = (first, second)
        if second is first:
            continue
        try:
            finite_run(pair, tiny_model(), tokenizer, rows)
            assert not law(*pair)
        except (HoldfastError, AssertionError, RuntimeError) as e:
            if not (said(pair) and law(*pair)):
                failures[second.name] = repr(e)
    assert failures == {}


def test_a_long_plan_runs(tiny_model, tokenizer, rows):
    """One method of every site at once, on an adapter."""
    plan = [
        hf.LoRA(r=2),
        hf.Freeze(layers=1, layer_decay=0.8),
        hf.InContextMix(share=0.2, pool=4),
        hf.Replay(share=0.2, sources=("holdfast:general/text.jsonl",), max_tokens=16),
        hf.DFT(),
        hf.ICLAnchor(every=1, pool=4, shots=(1, 2)),
        hf.KLToBase(on="replay", max_tokens=16),
        hf.L2ToInit(),
        hf.ProMoT(num_virtual_tokens=3),
        hf.LiNeS(alpha=0.5),
        hf.WiSEFT(alpha=0.9),
    ]
    result = run(plan, tiny_model(), tokenizer, rows, 8)
    assert {"task", "ICLAnchor", "KLToBase", "L2ToInit"} == set(result.log.loss[-1][1])
    assert all(result.session.effects[m.name] for m in plan)


# ---- why these pairs


def made(number, *sites, **about):
    """A method that has these sites, for the planner alone."""
    own = {s: lambda self, *_, empty=() if s == "stages" else None: empty for s in sites}
    kind = type(f"Made{number:03}", (Method,), {"__module__": __name__, **own, **about})
    return dataclass(frozen=True, kw_only=True)(kind)()


def a_house(number):
    """So many methods spread over all sites as the papers are: most have one, some two, half of `adapt` wraps."""
    often = [s for s in SITES for _ in range(2 if s in weight_sites() else 1)] + ["adapt"] * 4 + ["loss"] * 4
    house = []
    for n in range(number):
        first, turn = often[n % len(often)], n // len(often)
        sites = {first, *([SITES[(5 * n) % len(SITES)]] if n % 3 == 0 else [])}
        about = {"phase": PHASES[n % 3], "wraps": "adapt" in sites and turn % 2 == 0}
        if n % 7 == 0 and not about["wraps"]:
            about["needs"] = frozenset({"dense"})
        if n % 10 == 9:
            about["refuses"] = {f"Made{n - 1:03}": "they are the same."}
        house.append(made(n, *sites, **about))
    return house


def check_choice(methods):
    """The promises of `pairs_to_run`, asked of its answer by other words than its own."""
    chosen = pairs_to_run(methods)
    assert [c.name for c in pairs_to_run(methods[::-1])] == [c.name for c in chosen]
    assert all(c.why and said(c.pair) is None for c in chosen)
    met = {frozenset(m.name for m in c.pair) for c in chosen}
    assert len(met) == len(chosen)
    lonely = {m.name for m in methods} - {name for pair in met for name in pair}
    for a, b in combinations(methods, 2):
        fits = said((a, b)) is None or said((b, a)) is None
        assert not (fits and {a.name, b.name} & lonely), (a.name, b.name)
        crowd = max((sum(s in acts(m) for m in methods) for s in acts(a) & acts(b)), default=0)
        if fits and shared(a, b) and crowd <= FELLOWS + 1:
            assert {a.name, b.name} in met, f"{a.name} and {b.name}: {shared(a, b)}"
    sites = {frozenset(p) for c in chosen for p in product(c.pair[0].sites(), c.pair[1].sites())}
    for a, b in combinations(methods, 2):
        if said((a, b)) is None or said((b, a)) is None:
            assert {frozenset(p) for p in product(a.sites(), b.sites())} <= sites, (a.name, b.name)
    return chosen


def test_the_choice_is_explained():
    """`pytest -s -k explained` prints why each pair is run."""
    for c in check_choice(METHODS):
        print(f"{c.name}: {'; '.join(c.why)}")
    assert {t for c in CHOSEN for t in meetings(*c.pair)} == set(possible(METHODS))
    why = {c.name: c.why for c in CHOSEN}
    names = {frozenset(n.split("-")): n for n in why}
    for pair in (("LiNeS", "WiSEFT"), ("Freeze", "LoRA"), ("Freeze", "HalfFineTune")):
        assert any(w.startswith("both have weights at") for w in why[names[frozenset(pair)]]), pair
    reasons = [w for words in why.values() for w in words]
    assert len([w for w in reasons if " meets " in w]) > len(SITES)


def test_what_two_methods_share():
    assert {"adapt", "grad", "update", "merge"} <= set(weight_sites()) and "loss" not in weight_sites()
    share = lambda a, b: shared(BY_NAME[a].method, BY_NAME[b].method)  # noqa: E731
    assert share("LiNeS", "WiSEFT") == "both have weights at merge"
    assert share("Freeze", "LoRA") == "both have weights at adapt"
    assert share("OrthogonalSubspace", "LiNeS") == share("DFT", "ICLAnchor") == ""
    masks, steps = made(1, "grad", phase="mask"), made(2, "update")
    assert shared(masks, steps) == "both have weights at grad"
    assert shared(masks, made(3, "grad", phase="mask")) == "both have weights at grad, grad (mask)"
    assert "the wrapper" in shared(made(4, "adapt", wraps=True), made(5, "adapt", wraps=True))
    assert traits(BY_NAME["LoRA"].method) >= {"adapt", "wrapper"}


def test_a_missing_run_is_seen(monkeypatch):
    """What `check_choice` promises can be broken."""
    import test_pairs

    needed = [n for n, c in enumerate(CHOSEN) if any(w.startswith("both have") for w in c.why)]
    assert needed
    for gone in needed[:: max(1, len(needed) // 8)]:  # what meets only by its sites may be covered by a later run
        monkeypatch.setattr(test_pairs, "pairs_to_run", lambda methods, g=gone: CHOSEN[:g] + CHOSEN[g + 1 :])
        with pytest.raises(AssertionError):
            check_choice(METHODS)


def test_order_of_phases_decides_the_order_of_a_pair():
    first, last = made(1, "grad", phase="mask"), made(2, "grad", phase="project")
    assert orders(last, first) == [(first, last)] and law(last, first) == "mask, then rescale, then project"


# ---- a hundred


def test_a_hundred_methods_need_few_runs():
    """Some four runs a method, one method in few of them, and twice the methods are twice the runs, not four times."""
    chosen = check_choice(a_house(100))
    most = Counter(m.name for c in chosen for m in c.pair).most_common(1)[0][1]
    count = {100: len(chosen), 200: len(pairs_to_run(a_house(200)))}
    print(count, most)
    assert count[100] <= 4 * 100 and count[200] <= 2.5 * count[100]
    assert most <= 2 * FELLOWS + len(SITES)


def test_the_planner_is_quick_on_a_hundred_methods():
    house, begin = a_house(100), time.perf_counter()
    assert [w for w in map(wrong, permutations(house, 2)) if w] == []
    assert sum(said(p) is not None for p in permutations(house, 2)) > 100
    assert time.perf_counter() - begin < 20
