"""Two measurements of the same items: differences, shares kept, and verdicts that are earned."""

import copy
import random

import pytest

from holdfast.errors import HoldfastError
from holdfast.measure import stats
from holdfast.measure.compare import abilities, ability, estimates, only_after, verdict
from holdfast.report import schema

KEEP = 0.95


def measured(scores: dict[str, list[int]], chance: float = 0.0) -> dict:
    """A measurement as `measure.suites.in_context.measure` writes it."""
    tasks = [
        {
            "name": name,
            "version": 1,
            "chance": chance,
            "metric": "exact",
            "items": [
                {"id": f"{name}/{n}", "cluster": name, "correct": x, "logprob": -1.0} for n, x in enumerate(row)
            ],
        }
        for name, row in scores.items()
    ]
    return {"suite": "in-context", "num_fewshot": 8, "limit": 48, "seed": 0, "tasks": tasks}


def drawn(tasks: int, items: int, p: float = 0.7, seed: int = 0) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {f"t{i}": [int(draw.random() < p) for _ in range(items)] for i in range(tasks)}


def damaged(measurement: dict, share: float) -> dict:
    """The same with `share` of the right answers now wrong."""
    out, draw = copy.deepcopy(measurement), random.Random(1)
    for item in (i for t in out["tasks"] for i in t["items"]):
        if item["correct"] and draw.random() < share:
            item["correct"] = 0
    return out


@pytest.mark.parametrize(("tasks", "items"), [(1, 4), (1, 20), (3, 8), (6, 48), (20, 48)])
def test_a_model_against_itself_loses_exactly_nothing(tasks, items):
    base = measured(drawn(tasks, items, p=0.8))
    part = ability(base, copy.deepcopy(base), KEEP)
    differences = [t["difference"]["value"] for t in part["tasks"]]
    assert differences == [0.0] * tasks
    if part["status"] != "not measurable":
        assert part["difference"]["value"] == part["difference"]["low"] == part["difference"]["high"] == 0.0
        assert part["retention"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert part["before"] == part["after"]


@pytest.mark.parametrize(("tasks", "items", "status"), [(1, 20, "unclear"), (20, 48, "kept")])
def test_no_change_is_proof_only_with_enough_items(tasks, items, status):
    base = measured(drawn(tasks, items))
    assert ability(base, base, KEEP)["status"] == status


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_planted_damage_is_lost(share):
    base = measured(drawn(8, 48))
    part = ability(base, damaged(base, share), KEEP)
    assert part["status"] == "lost"
    assert part["retention"]["high"] < KEEP
    assert part["difference"]["high"] < 0


def test_a_real_loss_inside_the_margin_is_not_lost():
    base = measured(drawn(20, 100))
    part = ability(base, damaged(base, 0.02), 0.9)
    assert part["difference"]["value"] < 0
    assert part["status"] == "kept"


def test_few_damaged_items_are_unclear():
    base = measured({"a": [1] * 14 + [0] * 2})
    after = copy.deepcopy(base)
    after["tasks"][0]["items"][0]["correct"] = 0
    assert ability(base, after, KEEP)["status"] == "unclear"


def test_the_share_kept_is_counted_above_chance():
    # task a: 0.9 -> 0.7 at chance 0.5 is 0.8 -> 0.4 of what can be gained; task b the same without loss
    base = measured({"a": [1] * 90 + [0] * 10, "b": [1] * 90 + [0] * 10}, chance=0.5)
    after = measured({"a": [1] * 70 + [0] * 30, "b": [1] * 90 + [0] * 10}, chance=0.5)
    part = ability(base, after, KEEP)
    assert part["retention"]["value"] == pytest.approx((0.4 + 0.8) / (0.8 + 0.8))
    assert part["before"]["value"] == pytest.approx(0.9)  # plain, not above chance
    assert part["after"]["value"] == pytest.approx(0.8)
    assert part["difference"]["value"] == pytest.approx(-0.1)
    assert part["margin"] == pytest.approx(0.05)


def test_a_task_at_chance_does_not_count():
    base = measured({"good": [1] * 40 + [0] * 8, "noise": [1, 0] * 24}, chance=0.5)
    part = ability(base, damaged(base, 0.5), KEEP)
    assert [t["status"] for t in part["tasks"]] == [None, "not measurable"]
    assert part["note"] == "1 of 2 tasks are not measurable with this model and do not count"
    assert part["before"]["value"] == pytest.approx(40 / 48)  # of the good task alone


def test_an_ability_the_base_does_not_have_is_not_judged():
    base = measured({"a": [0] * 20, "b": [0] * 20})
    part = ability(base, base, KEEP)
    assert part["status"] == "not measurable"
    assert part["retention"] is None
    assert verdict([part], None)["status"] == "not checked"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["tasks"][0]["items"].pop(), "'t0' do not hold the same items"),
        (lambda m: m["tasks"].pop(), "'t1' do not hold the same items"),  # a missing task must not count as kept
        (lambda m: m["tasks"].append({**m["tasks"][0], "name": "new"}), "'new' do not hold the same items"),
        (lambda m: m["tasks"][1].update(metric="bleu"), "'t1' has metric 'exact', the other 'bleu'"),
        (lambda m: m["tasks"][0].update(version=2), "'t0' has version 1, the other 2"),
        (lambda m: m.update(num_fewshot=4), "num_fewshot 8, the other 4"),
        (lambda m: m.update(seed=1), "seed 0, the other 1"),
        (lambda m: m.update(suite="anchors"), "suite 'in-context', the other 'anchors'"),
    ],
    ids=["item", "task", "more", "metric", "version", "shots", "seed", "suite"],
)
def test_other_questions_cannot_be_paired(change, words):
    base = measured(drawn(2, 20))
    after = copy.deepcopy(base)
    change(after)
    with pytest.raises(HoldfastError, match=words) as caught:
        ability(base, after, KEEP)
    assert "same version, suite, shots and limit" in caught.value.cure


def test_estimates_leave_out_the_side_that_is_missing():
    items = measured({"a": [1, 1, 1, 0]})["tasks"][0]["items"]
    both = estimates(items, items)
    assert both["before"]["value"] == both["after"]["value"] == 0.75
    assert both["difference"]["value"] == 0
    assert estimates(None, items)["before"] is estimates(None, items)["difference"] is None
    assert estimates(items, None)["after"] is None


def test_a_tuned_model_alone_stands_in_the_column_after():
    part = only_after(measured(drawn(4, 48)), KEEP)
    assert part["before"] is None and part["difference"] is None and part["status"] is None
    assert 0.5 < part["after"]["value"] < 0.9
    assert all(t["before"] is None and t["after"]["n"] == 48 for t in part["tasks"])


@pytest.mark.parametrize(("right", "items"), [(4, 6), (7, 10), (15, 20)])
def test_few_items_of_which_one_is_gained_prove_nothing(right, items):
    base = measured({"q": [1] * right + [0] * (items - right)})
    after = measured({"q": [1] * (right + 1) + [0] * (items - right - 1)})
    assert ability(base, after, KEEP)["status"] == "unclear"
    assert ability(base, after, KEEP, required=False)["status"] == "no loss shown"


def test_the_margin_is_one_of_plain_scores():
    """0.9 right where a coin has 0.5: 5 % of what lies above it are 0.02. No change proves that from 149 items on."""

    def unchanged(items: int):
        base = measured({"q": [int(n % 10 > 0) for n in range(items)]}, chance=0.5)
        return ability(base, copy.deepcopy(base), KEEP)["status"]

    assert [unchanged(n) for n in (80, 100, 140, 160)] == ["unclear"] * 3 + ["kept"]


def test_what_somebody_asked_to_keep_and_nobody_can_see_is_not_kept():
    seen = {"name": "a", "status": "kept", "retention": {"value": 1.0, "low": 1.0, "high": 1.0}, "margin": 0.05}
    blind = {"name": "safety", "status": "not measurable", "retention": None, "margin": 0.05}
    found = verdict([seen, blind], None, {"safety": 0.97})
    assert found["status"] == "unclear" and found["sentence"].startswith("Not shown to be kept: safety. Kept: a")
    assert verdict([seen, blind], None)["status"] == "kept"
    assert verdict([{**seen, "status": "lost"}, blind], None, ["safety"])["status"] == "lost"


def test_one_loss_decides_the_verdict():
    base = measured(drawn(8, 48))
    kept = {**ability(base, base, KEEP), "name": "kept one"}
    lost = {**ability(base, damaged(base, 0.5), KEEP), "name": "lost one"}
    task = estimates([{"correct": 0}] * 4, [{"correct": 1}] * 4)
    told = verdict([kept, lost], task)
    assert told["status"] == "lost"
    assert told["sentence"].startswith("Lost: lost one 0.")
    assert "kept one" not in told["sentence"]
    assert told["sentence"].endswith("The task went from 0.00 to 1.00.")
    assert verdict([kept], None)["sentence"].startswith("Kept: kept one")


def test_an_ability_too_small_to_be_proved_raises_alarms_only():
    """36 items cannot prove 95 %: unchanged, they do not stop a 'kept', and are named; damaged, they say lost."""
    large = measured({f"t{n}": [1] * 40 + [0] * 8 for n in range(20)})
    small = {**measured({"s": [1] * 20 + [0] * 16}), "suite": "instructions"}
    parts = abilities([large, small], [large, small], {}, 0.95)
    assert [p["status"] for p in parts] == ["kept", "no loss shown"]
    found = verdict(parts, None)
    assert found["status"] == "kept" and "too few items to prove more: instructions" in found["sentence"]
    asked = abilities([large, small], [large, small], {"instructions": 0.95}, 0.95)
    assert [p["status"] for p in asked] == ["kept", "unclear"]
    broken = {**measured({"s": [0] * 36}), "suite": "instructions"}
    assert [p["status"] for p in abilities([large, small], [large, broken], {}, 0.95)] == ["kept", "lost"]
    assert verdict(abilities([small], [small], {}, 0.95), None)["status"] == "not checked"


# ---- what is printed


SHAPES = [(1, 3), (1, 36), (2, 5), (5, 10), (20, 48)]  # tasks x items


def graded(tasks: int, items: int, seed: int, p: float) -> dict:
    """Graded scores in clusters of two, as the instructions suite has them."""
    draw = random.Random(f"{tasks}/{items}/{seed}/{p}")
    out = measured(drawn(tasks, items, p, seed))
    for task in out["tasks"]:
        task["clustered"] = draw.random() < 0.5
        for n, item in enumerate(task["items"]):
            item["cluster"] = f"{task['name']}/{n // 2}"
            item["correct"] = min(1.0, max(0.0, item["correct"] + draw.choice([0, 0, 0, 0.5, -0.5])))
    return out


def estimates_in(part) -> list[tuple[str, dict]]:
    """(name, estimate) of every estimate anywhere in a part of a report."""
    if isinstance(part, list):
        return [found for p in part for found in estimates_in(p)]
    if not isinstance(part, dict):
        return []
    here = [(k, v) for k, v in part.items() if isinstance(v, dict) and "low" in v]
    return here + [found for v in part.values() for found in estimates_in(v)]


@pytest.mark.parametrize(("tasks", "items"), SHAPES)
@pytest.mark.parametrize("p", [0.03, 0.5, 0.97, 1.0])
def test_every_interval_of_a_report_stays_within_bounds(tasks, items, p):
    for seed in range(6):
        before, after = graded(tasks, items, seed, p), graded(tasks, items, seed, max(0.0, p - 0.1 * seed))
        after["tasks"] = [{**a, "clustered": b["clustered"]} for a, b in
                          zip(after["tasks"], before["tasks"], strict=True)]  # fmt: skip
        parts = [*abilities([before], [after], {}, KEEP), only_after(after, KEEP),
                 estimates(before["tasks"][0]["items"], after["tasks"][0]["items"])]  # fmt: skip
        found = estimates_in(parts)
        assert len(found) >= 3 * tasks
        for name, e in found:
            least = {"difference": -1.0, "retention": -float("inf")}.get(name, 0.0)
            most = float("inf") if name == "retention" else 1.0
            assert e["low"] is not None and e["high"] is not None
            assert least <= e["low"] <= e["value"] + 1e-12 and e["value"] - 1e-12 <= e["high"] <= most, (name, e)


def test_the_instructions_suite_as_it_was_found():
    """Graded answers near the top, where the t interval alone ends beyond 1 ("0.30 to 1.03")."""
    scores = [1, 1, 1, 0.5, 0.5, 0]
    base = measured({"t": scores})
    assert stats.mean(scores).high > 1
    # mean .6667, SE^2 = .8333/5/6 = .027778, n = .2222/.027778 = 8; t(.975, 5)^2 = 6.608: .2654 to .9172
    assert schema.estimate(ability(base, None, KEEP)["tasks"][0]["before"]) == "0.67 (0.27 to 0.92)"
