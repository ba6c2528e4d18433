"""compare: plans on one recipe. Figures of several runs, packed scores, and whole comparisons of a tiny model."""

import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from browser import CHROMIUM, assert_fits
from holdfast import cli
from holdfast.data import task
from holdfast.errors import HoldfastError, PlanError, RecipeError
from holdfast.hosts import plain
from holdfast.measure import stats
from holdfast.measure.packed import pack, pack_suite, unpack
from holdfast.measure.parts import COARSE, FINE, REPORT, cut, for_choosing
from holdfast.measure.probe import Ask
from holdfast.measure.recipes import abilities, kept
from holdfast.measure.stats import Estimate
from holdfast.measure.suites import build
from holdfast.methods import ICLAnchor, KLToBase, LoRA, Replay, all_methods
from holdfast.plan import Plan
from holdfast.recipe import recipe_from
from holdfast.report import compared, schema
from holdfast.runs import abilities as abilities_of_runs
from holdfast.runs import cluster, halves, job, search, task_rows
from holdfast.runs import comparison as runs
from holdfast.runs.compare_advice import _apart
from holdfast.runs.compare_ends import Ends, point_of
from holdfast.runs.compare_half import check_made, fits, packed
from holdfast.runs.compare_report import compared as compared_runs
from holdfast.runs.compare_report import hypervolume
from holdfast.runs.contestants import Cell, check_seeds, faster, has_rates, plans_of
from holdfast.runs.grid import Grid, check_grid, finer
from holdfast.runs.repair_search import Point
from holdfast.runs.search import Search
from holdfast.verbs.compare import compare
from holdfast.verbs.tune import tune
from tiny_run import recipe_data

NAN = {"learning_rate": 1e30}

# ---- figures of several runs


def drawn(rng, rate, num_items):
    return (rng.random(num_items) < rate).astype(float)


def test_one_run_is_the_retention_of_one():
    rng = np.random.default_rng(0)
    base, tuned = drawn(rng, 0.8, 60), drawn(rng, 0.6, 60)
    clusters = np.arange(60) // 3
    one = stats.retention({"a": (base, tuned, clusters)}, {"a": 0.25})
    same, _, each = stats.retention_of_runs({"a": (base, [tuned], clusters)}, {"a": 0.25})
    assert (same.value, same.low, same.high) == pytest.approx((one.value, one.low, one.high), abs=1e-12)
    assert each == pytest.approx([one.value])


def test_several_runs_by_hand():
    """Base 0.8; runs of 0.6 and 0.4, the same shares of every item's kind: kept 0.75 and 0.5, in the mean 0.625.

    The seeds' part: standard error |0.75 - 0.5| / 2 = 0.125, and t with one degree of freedom at 97.5 % is 12.706.
    """
    base = [1.0] * 8 + [0.0] * 2
    first, second = [1.0] * 6 + [0.0] * 4, [1.0] * 4 + [0.0] * 6
    ratio, draws, each = stats.retention_of_runs({"a": (base, [first, second], None)}, {"a": 0.0}, draws=40000)
    assert (ratio.value, each) == (pytest.approx(0.625), pytest.approx([0.75, 0.5]))
    assert ratio.high - 0.625 == pytest.approx(12.706 * 0.125, rel=0.1)
    assert draws.shape == (40000,)


def test_runs_that_agree_leave_the_items_alone():
    rng = np.random.default_rng(1)
    base, tuned = drawn(rng, 0.8, 200), drawn(rng, 0.7, 200)
    one = stats.retention({"a": (base, tuned, None)}, {"a": 0.0})
    three, _, _ = stats.retention_of_runs({"a": (base, [tuned] * 3, None)}, {"a": 0.0})
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)


def test_a_mean_over_runs_by_hand():
    """0.7 and 0.8 with item widths of 0.1: t(1) * 0.05 = 0.6353, and sqrt(0.1^2 + 0.6353^2) = 0.6431."""
    each = [Estimate(0.7, 0.6, 0.8, 50), Estimate(0.8, 0.7, 0.9, 50)]
    found = stats.mean_of_runs(each)
    assert (found.value, found.value - found.low) == (pytest.approx(0.75), pytest.approx(0.6431, abs=1e-3))
    assert stats.mean_of_runs(each[:1]) == each[0]
    with pytest.raises(HoldfastError, match="no run"):
        stats.mean_of_runs([])


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({}, "no task"),
        ({"a": ([1.0, 0.0], [], None)}, "runs"),
        ({"a": ([1.0], [[1.0]], None), "b": ([1.0], [[1.0], [1.0]], None)}, "runs"),
    ],
)
def test_runs_that_cannot_be_averaged_are_refused(tasks, words):
    with pytest.raises(HoldfastError, match=words):
        stats.retention_of_runs(tasks, {"a": 0.0, "b": 0.0})


def suite_of(marks):
    items = [{"id": str(n), "correct": int(x)} for n, x in enumerate(marks)]
    task = {"name": "a", "chance": 0.0, "metric": "exact", "items": items}
    return {"suite": "s", "num_fewshot": 0, "seed": 0, "tasks": [task]}


def harmless(rng, spread, num_runs, num_items=240, rate=0.8):
    """(base, runs) of a recipe that loses nothing in the mean: its seeds are off by `spread`, up or down."""
    hard = rng.random(num_items)
    base = suite_of(hard < rate)
    moves = rng.normal(0, spread, num_runs)
    moved = [rng.random(num_items) < 0.05 for _ in moves]  # answers that change either way, whatever the seed
    runs = [
        suite_of(np.where(m, rng.random(num_items) < rate, hard < rate + s)) for m, s in zip(moved, moves, strict=True)
    ]
    return base, runs


def judged(rng, spread, num_runs):
    return kept(*harmless(rng, spread, num_runs), 0.97)["status"]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_that_differ_are_no_alarm(seeds):
    """Two to three points from seed to seed: at most 5 % of 500 harmless recipes may be called lost."""
    rng = np.random.default_rng(0)
    found = [judged(rng, 0.02, seeds) for _ in range(500)]
    assert found.count("lost") <= 25


def test_many_abilities_are_no_alarm_either():
    """Of 150 harmless recipes with six abilities each at most 5 % may have any that is called lost."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(150):
        sides = [harmless(rng, 0.02, 3) for _ in range(6)]
        befores = [{**base, "suite": f"s{n}"} for n, (base, _) in enumerate(sides)]
        runs = [[{**each[run], "suite": f"s{n}"} for n, (_, each) in enumerate(sides)] for run in range(3)]
        alarms += any(p["status"] == "lost" for p in abilities(befores, runs, {}, 0.97))
    assert alarms <= 7


def test_few_items_over_seeds_can_only_raise_an_alarm():
    """As with one seed: a suite that nobody asked to keep and that can prove nothing shows no loss."""
    base = suite_of([1] * 12)
    (asked,) = abilities([base], [[base]] * 3, {"s": 0.95}, 0.95)
    (unasked,) = abilities([base], [[base]] * 3, {}, 0.95)
    assert asked["status"] == "unclear" and unasked["status"] == "no loss shown"


def test_one_seed_of_such_a_recipe_often_is():
    """Why seeds are asked for: an item-level test of a single run takes the luck of its seed for a loss."""
    rng = np.random.default_rng(0)
    assert [judged(rng, 0.04, 1) for _ in range(100)].count("lost") > 15


def test_a_real_loss_is_seen_over_seeds():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    runs = [suite_of(hard < 0.6 + x) for x in (-0.01, 0.0, 0.01)]
    found = kept(suite_of(hard < 0.8), runs, 0.97)
    assert found["status"] == "lost" and len(found["runs"]) == 3
    assert found["retention"]["value"] == pytest.approx(np.mean(found["runs"]))


@pytest.mark.parametrize(("num_items", "status"), [(12, "unclear"), (400, "kept")])
def test_no_change_over_seeds_is_proof_only_with_enough_items(num_items, status):
    base = suite_of([1] * num_items)
    assert kept(base, [base], 0.95)["status"] == kept(base, [base] * 3, 0.95)["status"] == status


# ---- scores in a few bytes


def test_packed_scores_come_back():
    like = [{"id": "a", "correct": 1, "logprob": -1.5, "answer": "x"}, {"id": "b", "correct": 0, "logprob": -2.0}]
    items = [{"id": "a", "correct": 0, "logprob": -1.0, "answer": "y"}, {"id": "b", "correct": 0, "cut": True}]
    packed = pack(items, like)
    assert packed["correct"] == "00" and "id" not in packed
    plain = [{k: v for k, v in i.items() if k != "answer"} for i in items]
    assert unpack(json.loads(json.dumps(packed)), like) == plain


# ---- rows and advice


def rows_right(num):
    """40 rows of a task, so many of them right."""
    return [{"id": str(n), "correct": int(n < num), "logprob": -1.0, "tokens": 1, "bytes": 1} for n in range(40)]


def ends_of(base_suites, floors, asked=None):
    """A task that the base fails, and suites by name: what share of 400 items the base has right."""
    suites = [{**suite_of(np.arange(400) < 400 * x), "suite": name} for name, x in base_suites.items()]
    about = {"name": "tickets", "metric": "exact_match", "split": "test"}
    return Ends(about, {"task": rows_right(0), "abilities": suites}, floors, floors if asked is None else asked)


def run_of(ends, right, seconds=1.0, **kept):
    """A run with so many task rows right, and of each suite the share of 400 items that is named, else the base's."""
    base = ends.base["abilities"]
    suites = [suite_of(np.arange(400) < 400 * kept[b["suite"]]) if b["suite"] in kept else b for b in base]
    return {
        "abilities": [pack_suite(a, b) for a, b in zip(suites, base, strict=True)],
        "task": pack(rows_right(right), ends.base["task"]),
        **{"learning_rate": 1.0, "seconds": seconds, "tokens_per_second": 1.0},
    }


def reported(ends, seeds=3, **plans):
    """The report of plans, each given by its runs."""
    final = {name: [(Cell(name, 1.0, n), run) for n, run in enumerate(found)] for name, found in plans.items()}
    return compared_runs(ends, ends, dict.fromkeys(plans, ()), final, {}, seeds)


def test_what_must_be_kept_and_cannot_be_seen_is_not_kept():
    ends = ends_of({"tales": 0.0, "words": 0.8}, {"tales": 0.97, "words": 0.9})
    found = reported(ends, p=[run_of(ends, 30)] * 3)
    (row,) = found["rows"]
    assert {a["name"]: a["status"] for a in row["abilities"]} == {"tales": "not measurable", "words": "kept"}
    assert (row["status"], row["unseen"]) == ("unclear", ["tales"])
    assert found["advice"] == (
        "No plan is shown to keep what it must (tales 0.97, words 0.9); nearest in this list: p. "
        "Not measurable with this model, so nothing is said of it: tales."
    )
    seen = reported(ends_of({"words": 0.8}, {"words": 0.9}), p=[run_of(ends_of({"words": 0.8}, {}), 30)] * 3)
    assert seen["advice"] == "Take p: it alone is shown to keep what it must (words 0.9)."


def test_what_nobody_asked_for_and_nobody_has_holds_no_plan_up():
    """A base without in-context ability, and a recipe that says nothing of it."""
    ends = ends_of({"in-context": 0.0, "words": 0.8}, {"in-context": 0.97, "words": 0.9}, asked=["words"])
    found = reported(ends, p=[run_of(ends, 30)] * 3)
    assert [(r["status"], r["unseen"]) for r in found["rows"]] == [("kept", ["in-context"])]
    assert found["advice"] == (
        "Take p: it alone is shown to keep what it must (words 0.9). "
        "Not measurable with this model, so nothing is said of it: in-context."
    )


def test_a_loss_beside_what_must_be_kept_is_a_loss():
    ends = ends_of({"tales": 0.8, "words": 0.8}, {"tales": 0.9})
    alone = reported(ends, greedy=[run_of(ends, 40, words=0.4)] * 3)
    assert [(r["status"], r["lost_beside"]) for r in alone["rows"]] == [("lost", ["words"])]
    beside = "greedy loses words, which measure.keep does not name."
    assert alone["advice"] == (
        "No plan is shown to keep what it must (tales 0.9) and lose nothing else; nearest in this list: greedy. "
        f"{beside}"
    )
    found = reported(ends, greedy=[run_of(ends, 40, words=0.4)] * 3, careful=[run_of(ends, 20)] * 3)
    assert [(r["name"], r["status"]) for r in found["rows"]] == [("careful", "kept"), ("greedy", "lost")]
    assert found["advice"] == (
        f"Take careful: it alone is shown to keep what it must (tales 0.9) and lose nothing else. {beside}"
    )


def test_a_plan_that_lost_its_seeds_is_no_verdict():
    """The interval of one run has no part for the seeds, and would look surer than three do."""
    ends = ends_of({"tales": 0.8}, {"tales": 0.9})
    alone = reported(ends, lucky=[run_of(ends, 40)])
    assert alone["rows"][0]["status"] == "unclear"
    missing = "lucky came through with 1 of 3 seeds, too few for a verdict about it."
    assert alone["advice"] == f"No plan is shown to keep what it must (tales 0.9). {missing}"
    found = reported(ends, lucky=[run_of(ends, 40)], whole=[run_of(ends, 20)] * 3, most=[run_of(ends, 10)] * 2)
    assert [(r["name"], r["status"]) for r in found["rows"]] == [
        ("whole", "kept"),
        ("most", "kept"),
        ("lucky", "unclear"),
    ]
    assert found["advice"].startswith("Take whole:") and found["advice"].endswith(missing)
    text = compared.markdown(found)
    assert "| 1 of 3 |" in text and "| 2 of 3 |" in text and "3 seeds each, or as many as the table says" in text
    assert " of 3 |" not in compared.markdown(reported(ends, whole=[run_of(ends, 20)] * 3))
    assert reported(ends, seeds=1, one=[run_of(ends, 20)])["rows"][0]["status"] == "kept"


def test_the_area_is_of_the_half_that_chose():
    """Its base has 10 of 40 rows right, and the trials 20 and 30: gains of a half and of all of what was gained.

    The base of the other half has none right, so the gains would be two thirds and all.
    """
    ends = ends_of({"tales": 0.8}, {"tales": 0.9})
    choosing = Ends(ends.about, {**ends.base, "task": rows_right(10)}, ends.floors)
    final, trials = {}, {}
    for name, right in (("some", 20), ("more", 30)):
        cell = Cell(name, 1.0, 0)
        found = {**run_of(ends, right), "task": pack(rows_right(right), choosing.base["task"])}
        trials[name], final[name] = [point_of(choosing, cell, found)], [(cell, run_of(ends, right))]
    found = compared_runs(ends, choosing, trials, final, {}, 1)
    assert {r["name"]: r["hypervolume"] for r in found["rows"]} == pytest.approx({"some": 0.5, "more": 1.0})
    alone = compared_runs(ends, choosing, trials, {"some": final["some"]}, {}, 1)  # "more" failed after its trial
    assert {r["name"]: r["hypervolume"] for r in alone["rows"]} == pytest.approx({"some": 0.5})
    assert "area" not in compared.markdown(found)
    page = compared.page(found)
    assert page.index("What chose the learning rates") < page.index("more 1.00, some 0.50.")


def test_the_area_by_hand():
    """Rectangles to (1, 0.5) and (0.5, 1): 0.5 + 0.5 * 0.5; what they dominate adds nothing."""
    assert hypervolume([(0.5, 1.0), (1.0, 0.5), (0.4, 0.4)]) == pytest.approx(0.75)
    assert hypervolume([]) == 0.0


# ---- what is refused before any work


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "Nothing is to be compared"),
        (["LoRA", "LoRA"], "with itself"),
        (["LoRA+Replay", " LoRA + Replay"], "with itself"),
        (["plain+LoRA"], "plain, which is a whole plan"),
        (["LoRa"], "no method 'LoRa'"),
        (["LoRA+EAF"], "no method 'EAF'"),
        (["LoRA+HalfFineTune"], "HalfFineTune"),
    ],
)
def test_plans_that_cannot_take_part(world, tmp_path, names, words):
    recipe = recipe_from(recipe_data(world, tmp_path))
    with pytest.raises(PlanError, match=words):
        plans_of(names, recipe)


def test_the_plans_by_name(world, tmp_path):
    recipe = recipe_from(recipe_data(world, tmp_path))
    found = plans_of(["default", "plain", "recipe", "LoRA + Replay"], recipe)
    assert found == {"default": None, "plain": [], "recipe": [{"LoRA": {"r": 2}}], "LoRA+Replay": ["LoRA", "Replay"]}


@pytest.mark.parametrize(
    ("factors", "strengths", "words"),
    [
        ((), (1.0,), "learning rates is empty"),
        ((1.0, 0.0), (1.0,), "learning rate cannot be multiplied by 0"),
        ((1.0, 1.0), (1.0,), "twice"),
        ((1 / 3, 0.33333), (1.0,), "twice"),
        ((float("nan"),), (1.0,), "nan"),
        ((1.0,), (), "strengths is empty"),
        ((1.0,), (0.0,), "strength cannot be multiplied by 0"),
        ((1.0,), (1.0, -0.3), "strength cannot be multiplied by -0.3"),
        ((1.0,), (0.5, 0.5), "strengths .* twice"),
    ],
)
def test_grids_that_hold_nothing(factors, strengths, words):
    with pytest.raises(PlanError, match=words):
        check_grid(factors, strengths)


@pytest.mark.parametrize("kind", [m for m in all_methods().values() if m.strengths], ids=lambda m: m.__name__)
def test_what_a_method_calls_its_strength(kind):
    one = kind()
    assert {*one.odds} <= {*one.strengths} and any(getattr(one, f) for f in one.strengths)
    same, half, double = (one.stronger(f).settings() for f in (1.0, 0.5, 2.0))
    assert all(same[name] == pytest.approx(getattr(one, name)) for name in one.strengths)
    for name, value in one.settings().items():
        if name not in one.strengths:
            assert half[name] == double[name] == value
        elif value:
            assert half[name] < value < double[name] and (
                name not in one.odds or one.stronger(1e6).settings()[name] < 1
            )


def test_strengths_by_hand():
    assert KLToBase(weight=0.5).stronger(0.3) == KLToBase(weight=0.15)
    assert ICLAnchor(weight=2.0, gold=0.0).stronger(3) == ICLAnchor(weight=6.0, gold=0.0)
    assert Replay(share=0.5).stronger(3).share == pytest.approx(0.75)  # three rows to each of the task's, not one
    assert LoRA().stronger(3) == LoRA()
    plan = Plan([LoRA(), KLToBase(weight=0.5)])
    assert plan.has_strength and plan.stronger(2) == Plan([LoRA(), KLToBase(weight=1.0)])
    assert not Plan([LoRA(), KLToBase(weight=0.0)]).has_strength


def test_no_seeds_are_no_run():
    with pytest.raises(PlanError, match="0 seeds"):
        check_seeds(0)


def test_every_plan_has_as_many_trials():
    rates, strengths = (0.5, 1.0, 2.0), (0.3, 1.0)
    strong, plain = (Grid("p", 0, rates, strengths, has).cells for has in (True, False))
    assert len(strong) == len(plain) == 6 and len({c.folder for c in (*strong, *plain)}) == 9
    assert {(c.factor, c.strength) for c in strong} == {(f, s) for f in rates for s in strengths}
    assert {c.strength for c in plain} == {1.0} and {*rates} < {c.factor for c in plain}
    assert (strong[0].factor, strong[0].strength) == (plain[0].factor, plain[0].strength) == (1.0, 1.0)


def test_rates_between_by_hand():
    """Of the gaps 1 to 4 and 4 to 8 the first is wider: its middle is 2; then all are equal, and the lowest goes."""
    assert finer((8.0, 1.0, 4.0), 4) == pytest.approx([1, 2, 4, 8])
    assert finer((8.0, 1.0, 4.0), 5) == pytest.approx([1, 2**0.5, 2, 4, 8])
    assert finer((1.0,), 3) == [1.0]


# ---- whole comparisons


def asked(world, tmp_path, **changes):
    measure = {"suites": ["language"], "limit": 8, "num_fewshot": 0, "keep": {"language": 0.9}}
    data = {"validation_size": 12}
    training = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.003}
    mapping = recipe_data(world, tmp_path / "unused", measure=measure, data=data, training=training)
    for key, value in changes.items():
        mapping[key] = {**mapping.get(key, {}), **value}
    return recipe_from(mapping)


def go(world, tmp_path, methods=("plain", "LoRA"), name="out", **more):
    options = {"factors": (1.0, 3.0), "seeds": 2, **more}
    recipe = options.pop("recipe", None) or asked(world, tmp_path)
    return compare(recipe, methods, tmp_path / name, **options)


def without_clock(report):
    """A report without what two equal comparisons differ in; of equal plans the faster one is advised."""
    rows = [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in report["rows"]]
    return {**{k: v for k, v in report.items() if k not in ("created", "advice")}, "rows": rows}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    return folder, go(world, folder)


def test_the_table(whole):
    folder, report = whole
    assert {r["name"] for r in report["rows"]} == {"plain", "LoRA"} and not report["failed"]
    for row in report["rows"]:
        assert row["seeds"] == [0, 1] and len(row["trials"]) == 2
        rates = [t["learning_rate"] for t in row["trials"]]
        assert rates == pytest.approx([0.003, 0.009]) and row["learning_rate"] in rates
        assert 0 <= row["hypervolume"] <= 1
        (ability,) = row["abilities"]
        assert len(ability["runs"]) == 2 and ability["retention"]["low"] < ability["retention"]["high"]
    assert report["advice"]
    for name in ("compare.md", "compare.html"):
        assert "LoRA" in (folder / "out" / name).read_text()
    picture = ElementTree.parse(folder / "out" / "compare.language.svg").getroot()
    shown = {t.text for t in picture.iter("{http://www.w3.org/2000/svg}title")}
    for row in report["rows"]:
        task, kept = row["task"]["value"], row["abilities"][0]["retention"]["value"]
        (line,) = (t for t in shown if t.startswith(f"{row['name']}: task {task:.2f}"))
        assert f"kept {round(100 * kept)} % (" in line
    assert (folder / "out" / "compare.language.png").read_bytes().startswith(b"\x89PNG")


def test_all_trials_are_drawn_apart_from_what_is_reported(whole):
    """In a picture of their own, below what says that they are on the items for choosing."""
    _, report = whole
    page = compared.page(report)
    before, after = page.split("<h2>What chose the learning rates</h2>")
    for row in report["rows"]:
        for trial in row["trials"]:
            rate = trial["learning_rate"]
            name = row["name"] if rate == row["learning_rate"] else f"{row['name']} {rate:.2g}"
            share = round(100 * trial["kept"]["language"]["value"])
            said = f"<title>{name}: task {schema.estimate(trial['task'])}, kept {share} % ("
            assert said in after
    assert before.count("<title>") == 1 + len(report["rows"]) and after.count("<title>") == 4
    assert "language kept, on the items for choosing" in after and "items for choosing" not in before


def test_the_trials_show_their_early_signs(whole):
    """Of all 4 steps, as training.json has them; a comparison of an older version shows none."""
    folder, report = whole
    page = (folder / "out" / "compare.html").read_text()
    for row in report["rows"]:
        for trial in row["trials"]:
            run = folder / "out" / "runs" / f"{row['name']}.x{trial['factor']:g}.0"
            assert trial["early"] == json.loads((run / "trained.json").read_text())["early"]
            assert trial["early"]["steps"] == 4 and f"<td>{trial['early']['grad_norm']:.3g}</td>" in page
    old = json.loads(json.dumps(report))
    for row in old["rows"]:
        for trial in row["trials"]:
            del trial["early"]
    assert "<td>-</td><td>-</td>" in compared.page(old)


def test_a_name_of_html_is_shown_as_it_is(whole):
    named = json.loads(json.dumps(whole[1]).replace('"language"', '"jsonl:a<i>&b"'))
    text = compared.page(named)
    assert "<i>" not in text and "jsonl:a&lt;i&gt;&amp;b kept" in text and "&amp;lt;" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the width of the page is not looked at")
def test_the_page_fits_phone_and_desktop(whole, tmp_path):
    long = json.loads(json.dumps(whole[1]).replace('"language"', '"jsonl:' + "x" * 300 + '"'))
    assert_fits(compared.page(long), tmp_path)


def test_what_was_chosen_is_written_down_with_its_hash(whole):
    folder, report = whole
    chosen = json.loads((folder / "out" / "chosen.json").read_text())
    rates = {r["name"]: r["learning_rate"] for r in report["rows"]}
    assert {n: 0.003 * c["factor"] for n, c in chosen.items()} == pytest.approx(rates)
    assert all(len(c["sha"]) >= 16 for c in chosen.values())
    choose, report_half = (json.loads((folder / "out" / f"base.{h}.json").read_text()) for h in ("choose", "report"))
    ids = [
        {i["id"] for a in half["abilities"] for t in a["tasks"] for i in t["items"]} for half in (choose, report_half)
    ]
    rows = [{i["id"] for i in half["task"]} for half in (choose, report_half)]
    assert not ids[0] & ids[1] and not rows[0] & rows[1]


def test_the_hash_is_of_recipe_model_and_data_wherever_the_run_lies(world, tmp_path):
    base, shas = tmp_path / "base", []
    shutil.copytree(world.base, base)
    recipe = asked(world, tmp_path, model={"model_name_or_path": str(base)}).model_dump(mode="json")
    for name in ("one", "again", "another model"):
        if name == "another model":
            shutil.rmtree(base)
            another_base(world, base)
        comparison = runs.Comparison(runs.Wish(recipe, ("plain",), (1.0,), 1), tmp_path, tmp_path / name)
        comparison.folder.claim()
        comparison.begin()
        comparison._write_down({"plain": Cell("plain", 1.0, 0)})
        shas.append(json.loads((tmp_path / name / "chosen.json").read_text())["plain"]["sha"])
    assert shas[0] == shas[1] != shas[2]


def test_only_small_files_stay(whole):
    folder, _ = whole
    left = [p for p in (folder / "out" / "runs").rglob("*") if p.is_file()]
    assert left and not [p for p in left if p.suffix == ".safetensors"]
    assert max(p.stat().st_size for p in left if p.name in ("half.choose.json", "half.report.json")) < 4000


def test_a_finished_comparison_does_nothing(whole, world, monkeypatch):
    folder, report = whole
    monkeypatch.setattr(runs, "checked", None)
    assert go(world, folder) == report


def test_nothing_is_done_twice(world, tmp_path, monkeypatch):
    """Two plans at two rates and two seeds: one base loaded, its rows read and each half asked once."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    loads, reads, scored, rows = [], [], [], []

    def counts(module, name, into, what=lambda *a, **k: 1):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: into.append(what(*a, **k)) or real(*a, **k))

    counts(job, "load", loads)
    counts(task, "prepare", reads)
    counts(halves, "score_suite", scored, lambda model, tokenizer, suite, **k: suite.probes[0].id)
    counts(task_rows, "score_task", rows)
    assert not go(world, tmp_path)["failed"]
    assert (len(loads), len(reads)) == (1, 1)
    choosing, reporting = 1 + 4, 1 + 4  # the base and runs: two rates of two plans, two seeds of two plans
    assert sorted(Counter(scored).values()) == [choosing, reporting]
    assert len(rows) == choosing + reporting


def test_a_single_trial_asks_nothing_for_choosing(world, tmp_path, monkeypatch):
    """Two plans at one rate and two seeds: no item is spent on a choice that nobody makes."""
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))
    asked_of, plain = [], halves.Halves.measured
    monkeypatch.setattr(
        halves.Halves, "measured", lambda self, half, *a, **k: asked_of.append(half) or plain(self, half, *a, **k)
    )
    found = go(world, tmp_path, factors=(1.0,), seeds=2)
    assert asked_of == ["report"] * (1 + 2 * 2) and not found["failed"]
    assert not (tmp_path / "out" / "base.choose.json").exists()
    assert {n: c["factor"] for n, c in json.loads((tmp_path / "out" / "chosen.json").read_text()).items()} == {
        r["name"]: 1.0 for r in found["rows"]
    }
    assert all(r["trials"] == [] and r["seeds"] == [0, 1] for r in found["rows"])
    assert compared.ALONE in (tmp_path / "out" / "compare.html").read_text()
    best = max(found["rows"], key=lambda r: r["task"]["value"])
    kept = [a["retention"]["value"] for a in best["abilities"] if a["name"] in found["keep"] and a["retention"]]
    if best["task"]["value"] > found["task"]["base"]["value"]:  # the largest gain counts as 1
        assert best["hypervolume"] == pytest.approx(min(1.0, max(0.0, min(kept, default=0.0))))


def test_the_items_for_choosing_are_asked_at_once():
    suite = build("in-context", Ask(None, 4, 12))
    parts, both = cut(suite), for_choosing(suite)
    reported = {p.id for p in parts[REPORT].probes}
    assert {p.id for p in both.probes} == {p.id for part in (COARSE, FINE) for p in parts[part].probes}
    assert [p.id for p in both.probes] == [p.id for p in suite.probes if p.id not in reported]
    assert both.settings["part"] == "coarse+fine" and {g.name for g in both.groups} == {p.task for p in both.probes}


def test_a_folder_belongs_to_one_comparison(whole, world):
    folder, _ = whole
    with pytest.raises(RecipeError, match="another recipe"):
        go(world, folder, seeds=3)


def test_strengths_are_tried_and_told(world, tmp_path):
    methods, options = ("plain", "LoRA+KLToBase"), {"factors": (1.0,), "strengths": (0.5, 1.0), "seeds": 2}
    report = go(world, tmp_path, methods, **options)
    assert not report["failed"]
    rows = {r["name"]: r for r in report["rows"]}
    assert [t["strength"] for t in rows["LoRA+KLToBase"]["trials"]] == [1.0, 0.5]
    assert [t["strength"] for t in rows["plain"]["trials"]] == [1.0]
    weaker = json.loads((tmp_path / "out/runs/LoRA-KLToBase.x1.s0.5.0/trained.json").read_text())
    own = json.loads((tmp_path / "out/runs/LoRA-KLToBase.x1.0/trained.json").read_text())
    assert weaker["terms"]["KLToBase"][-1][1] != own["terms"]["KLToBase"][-1][1]
    chosen = json.loads((tmp_path / "out/chosen.json").read_text())
    assert {n: c["strength"] for n, c in chosen.items()} == {n: r["strength"] for n, r in rows.items()}
    for name in ("compare.md", "compare.html"):
        assert "strength" in (tmp_path / "out" / name).read_text()
    with pytest.raises(RecipeError, match="another recipe"):
        go(world, tmp_path, methods, **{**options, "strengths": (0.3, 1.0)})


def test_a_folder_from_before_strengths_goes_on(whole, world, monkeypatch):
    folder, report = whole
    order = json.loads((folder / "out/recipe.yaml").read_text())
    assert order.pop("strengths") == [1.0]
    (folder / "out/recipe.yaml").write_text(json.dumps(order))
    (folder / "out/compare.json").unlink()
    monkeypatch.setattr(runs.training, "trained", None)
    assert without_clock(go(world, folder)) == without_clock(report)


def test_a_report_from_before_strengths_is_shown(whole):
    old = json.loads(json.dumps(whole[1]))
    for row in old["rows"]:
        for one in (row, *row["trials"]):
            del one["strength"]
    assert compared.page(old) == compared.page(whole[1]) and "strength" not in compared.page(old)


def test_a_folder_of_tune_is_no_place_for_a_comparison(world, tmp_path):
    tune(asked(world, tmp_path, training={"output_dir": str(tmp_path / "t")}))
    with pytest.raises(RecipeError, match=r"another recipe(?s:.*)--out"):
        go(world, tmp_path, name="t")


class Killed(BaseException):
    """Stands for a lost process."""


def another_base(world, folder):
    """The recipe's model with other weights."""
    shutil.copytree(world.base, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({n: w.flip(0).contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return {"model": {"model_name_or_path": str(folder)}}


def test_a_refused_plan_leaves_no_base_for_another_model(world, tmp_path):
    """All plans are checked before anything is measured: ProMoT has two stages, and the run one step."""
    short = {"training": {"max_steps": 1}}
    with pytest.raises(PlanError, match="2 stages"):
        go(world, tmp_path, ["plain", "ProMoT"], recipe=asked(world, tmp_path, **short))
    assert not list((tmp_path / "out").glob("base.*"))
    other = asked(world, tmp_path, **another_base(world, tmp_path / "other"), **short)
    options = {"recipe": other, "factors": (1.0,), "seeds": 1}
    bases = []
    for name in ("out", "fresh"):
        assert not go(world, tmp_path, ["plain"], name, **options)["failed"]
        bases.append({p.name: json.loads(p.read_text()) for p in (tmp_path / name).glob("base.*.json")})
    assert bases[0] == bases[1] and bases[0]


def test_a_measured_base_makes_the_folder_its_own(world, tmp_path, monkeypatch):
    """Killed before the first run: another model does not take this one's base for its own."""
    monkeypatch.setattr(runs.Comparison, "pick", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        go(world, tmp_path)
    assert len(list((tmp_path / "out").glob("base.*"))) == 2
    with pytest.raises(RecipeError, match="another recipe"):
        go(world, tmp_path, recipe=asked(world, tmp_path, **another_base(world, tmp_path / "other")))


@pytest.fixture
def mine(world, tmp_path):
    """A finished comparison that a test may spoil."""
    report = go(world, tmp_path)
    (tmp_path / "out" / "compare.json").unlink()
    return tmp_path / "out", report


def counted(monkeypatch):
    """The folders of the runs that are trained from now on."""
    plain, found = runs.training.trained, []
    monkeypatch.setattr(runs.training, "trained", lambda job: found.append(job.run.path.name) or plain(job))
    return found


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_what_another_version_measured_is_measured_anew(mine, world, tmp_path, monkeypatch):
    """First a run's half; then the base's, on which every half stands; and nothing where all fits."""
    folder, report = mine
    trained = counted(monkeypatch)

    def older(half):
        half["made"][0] = "python 2.7"
        half["task"] = {"correct": "0" * 6} if isinstance(half["task"], dict) else half["task"][::-1]

    changed(folder / "runs" / "plain.x1.0" / "half.choose.json", older)
    assert without_clock(go(world, tmp_path)) == without_clock(report)
    assert trained == ["plain.x1.0"]
    (folder / "compare.json").unlink()
    changed(folder / "base.choose.json", older)
    assert without_clock(go(world, tmp_path)) == without_clock(report)
    assert trained == ["plain.x1.0"], "the base is measured as it was, so every run still fits it"
    (folder / "compare.json").unlink()
    changed(folder / "runs" / "LoRA.x3.0" / "half.choose.json", lambda half: half.update(against="another base"))
    assert without_clock(go(world, tmp_path)) == without_clock(report)
    assert trained == ["plain.x1.0", "LoRA.x3.0"]


def test_inputs_of_every_plan_are_those_it_began_with(world, tmp_path):
    """Rows that choose, and a file that only the second plan reads."""
    texts, choosing = tmp_path / "texts.jsonl", tmp_path / "choosing.jsonl"
    rows = Path(world.train).read_text().splitlines(keepends=True)
    texts.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": f"{n}"}) + "\n" for n in range(9)))
    choosing.write_text("".join(rows[:12]))
    sets = {"validation": str(choosing), "validation_size": 0, "test": str(world.train)}
    with_file = asked(world, tmp_path, data=sets).model_copy(update={"plan": [{"Replay": {"sources": [str(texts)]}}]})
    options = {"methods": ["plain", "recipe"], "recipe": with_file, "factors": (1.0,), "seeds": 1}
    assert not go(world, tmp_path, **options)["failed"]
    (tmp_path / "out" / "compare.json").unlink()
    for path, words in ((texts, "texts.jsonl of Replay .plan recipe."), (choosing, "validation rows")):
        before = path.read_text()
        path.write_text("".join(before.splitlines(keepends=True)[1:]))
        with pytest.raises(RecipeError, match=f"{words} of this recipe is no longer"):
            go(world, tmp_path, **options)
        path.write_text(before)


def test_all_plans_are_asked_the_same_suites(world, tmp_path, monkeypatch):
    """suites: auto. Of 12 rows plain takes 3 steps, too few for `language`; half Replay takes 6, which are enough."""
    monkeypatch.setattr(abilities_of_runs, "DEFAULT", ("in-context", "language"))
    monkeypatch.setattr(abilities_of_runs, "_tokens", lambda recipe, rows, steps: steps)
    monkeypatch.setattr(abilities_of_runs, "cost", lambda ask: 0.6)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(world.train).read_text().splitlines(keepends=True)[:24]))
    changes = {"data": {"train": str(few)}, "measure": {"suites": ["auto"], "keep": None}}
    recipe = asked(world, tmp_path, **changes, training={"max_steps": -1, "num_train_epochs": 1})
    recipe = recipe.model_copy(update={"plan": [{"Replay": {"share": 0.5}}]})
    found = go(world, tmp_path, ["plain", "recipe"], recipe=recipe, factors=(1.0,), seeds=1)
    assert not found["failed"] and list(found["keep"]) == ["in-context"]
    assert [[a["name"] for a in row["abilities"]] for row in found["rows"]] == [["in-context", "language"]] * 2
    steps = [
        json.loads((tmp_path / "out/runs" / n / "trained.json").read_text())["steps"]
        for n in ("plain.x1.0", "recipe.x1.0")
    ]
    assert steps == [3, 6]


@pytest.mark.parametrize("kind", all_methods().values(), ids=lambda m: m.__name__)
def test_every_rate_of_a_stage_is_one_that_is_multiplied(kind):
    plan = Plan([kind()])
    own, tripled = ([s.learning_rate for m in p.methods for s in m.stages()] for p in (plan, faster(plan, 3.0)))
    assert tripled == [rate and pytest.approx(3 * rate) for rate in own]
    assert has_rates(plan) or not any(own)
    if not has_rates(plan):
        assert faster(plan, 3.0) == plan


def test_a_plan_with_a_rate_of_its_own_is_tried_at_others(world, tmp_path):
    found = go(world, tmp_path, ["PromptTuning"], factors=(1.0, 0.1), seeds=1)
    assert not found["failed"]
    (row,) = found["rows"]
    assert [t["learning_rate"] for t in row["trials"]] == pytest.approx([0.05, 0.005])
    first, second = (
        json.loads((tmp_path / "out/runs" / f"PromptTuning.x{x}.0" / "trained.json").read_text())["loss"]
        for x in ("1", "0.1")
    )
    assert first[0] == second[0] and first[-1] != second[-1]


def test_tune_works_in_the_folder_of_a_run(mine, world, tmp_path, monkeypatch):
    """It trains there anew, for the model is gone; and the comparison still finds what it measured."""
    folder, report = mine
    for run in (folder / "runs").glob("plain.*.0"):  # the chosen one, which was reported on, and the other
        assert "verdict" in json.loads((tune(run / "recipe.yaml") / "report.json").read_text())
    monkeypatch.setattr(runs.training, "trained", None)
    assert without_clock(go(world, tmp_path)) == without_clock(report)


def test_a_run_that_is_trained_again_needs_room_too(mine, world, tmp_path, monkeypatch):
    (mine[0] / "runs" / "plain.x1.0" / "half.choose.json").unlink()
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    assert "0.0 GB free" in go(world, tmp_path)["failed"]["plain, rate x 1, seed 0"]


def test_scores_are_paired_by_id():
    """As many items of the task, or of a suite, in another order."""
    suite = {"suite": "s", "tasks": [{"name": "a", "items": [{"id": "x", "correct": 1}, {"id": "y", "correct": 0}]}]}
    base = {"made": ["ours"], "abilities": [suite], "task": [{"id": "1", "correct": 0}, {"id": "2", "correct": 1}]}
    assert fits(packed(base, base), base) and not fits(packed(base, base), {**base, "made": ["others"]})
    turned = {**suite, "tasks": [{"name": "a", "items": suite["tasks"][0]["items"][::-1]}]}
    for other, what in (({"task": base["task"][::-1]}, "the task"), ({"abilities": [turned]}, "s/a")):
        with pytest.raises(HoldfastError, match=f"items of {what} that this run"):
            packed({**base, **other}, base)


def test_a_run_is_measured_as_the_base_was():
    check_made(["torch 2", "cpu"], {"made": ["torch 2", "cpu"]})
    with pytest.raises(HoldfastError, match="differ in cpu, cuda"):
        check_made(["torch 2", "cuda"], {"made": ["torch 2", "cpu"]})


@pytest.mark.parametrize("at", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 5))])
def test_a_killed_comparison_goes_on_to_the_same(whole, world, tmp_path, monkeypatch, at):
    plain, count = runs.training.trained, 0

    def dies(job):
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        return plain(job)

    monkeypatch.setattr(runs.training, "trained", dies)
    with pytest.raises(Killed):
        go(world, tmp_path)
    monkeypatch.undo()
    again = []
    monkeypatch.setattr(runs.training, "trained", lambda job: again.append(1) or plain(job))
    assert without_clock(go(world, tmp_path)) == without_clock(whole[1])
    assert len(again) == 6 - (at - 1)


def test_what_a_killed_training_took_before_counts(whole, world, tmp_path, monkeypatch):
    """Steps are counted by the checkpoints' clock, whichever process took them."""
    step, count = plain._step, []

    def slow(*given, **named):
        count.append(1)
        time.sleep(1.0)
        if len(count) == 4:
            raise Killed
        return step(*given, **named)

    monkeypatch.setattr(plain, "_step", slow)
    with pytest.raises(Killed):
        go(world, tmp_path, ["plain"], factors=(1.0,), seeds=1)
    monkeypatch.setattr(plain, "_step", step)
    (row,) = go(world, tmp_path, ["plain"], factors=(1.0,), seeds=1)["rows"]
    assert row["seconds"] > 2


def test_one_that_fails_stops_no_other_and_is_tried_again(whole, world, tmp_path, monkeypatch):
    plain = runs.training.trained

    def fails(job):
        if job.recipe.plan == [] and job.recipe.training.learning_rate > 0.005:
            raise ValueError("Out of range float values are not JSON compliant")
        return plain(job)

    monkeypatch.setattr(runs.training, "trained", fails)
    found = go(world, tmp_path)
    assert list(found["failed"]) == ["plain, rate x 3, seed 0"] and len(found["rows"]) == 2
    monkeypatch.undo()
    again = go(world, tmp_path)
    assert not again["failed"]
    chosen = json.loads((tmp_path / "out" / "chosen.json").read_text())
    rates = {r["name"]: r["learning_rate"] for r in again["rows"]}
    assert {r["name"]: r["learning_rate"] for r in whole[1]["rows"]} == pytest.approx(rates)
    assert {n: 0.003 * c["factor"] for n, c in chosen.items()} == pytest.approx(rates)


def test_plans_are_paired_by_seed():
    """The first seed of one plan failed: it has no partner, and the others keep theirs. Of a loss less is better."""

    def items(loss):
        return [{"id": str(n), "correct": 0, "logprob": -loss, "tokens": 1, "bytes": 1} for n in range(8)]

    base = {"task": items(1.0), "abilities": []}
    ends = Ends({"metric": "loss"}, base, {})

    def seeds(losses):
        return [(Cell("p", 1.0, seed), {"task": pack(items(x), base["task"])}) for seed, x in losses.items()]

    apart = _apart(ends, seeds({0: 0.1, 1: 0.5, 2: 0.7}), seeds({1: 0.6, 2: 0.8}))
    assert apart.value == pytest.approx(0.1)
    assert _apart(ends, seeds({0: 0.1}), seeds({1: 0.6})) is None


def test_a_plan_whose_runs_all_fail_is_left_out(world, tmp_path, monkeypatch):
    plain = runs.training.trained
    broken = RuntimeError("out of memory")

    def fails(job):
        if job.recipe.plan == []:
            raise broken
        return plain(job)

    monkeypatch.setattr(runs.training, "trained", fails)
    found = go(world, tmp_path, factors=(1.0,), seeds=1)
    assert [r["name"] for r in found["rows"]] == ["LoRA"] and "out of memory" in str(found["failed"])


def test_no_run_hands_a_model_over(world, tmp_path):
    """No model is uploaded or converted, and neither the hub nor llama.cpp is asked for."""
    export = {"merge": True, "gguf": "nowhere", "push_to_hub": "me/mine", "folder": str(tmp_path / "elsewhere")}
    found = go(world, tmp_path, ["LoRA"], recipe=asked(world, tmp_path, export=export), factors=(1.0,), seeds=1)
    assert not found["failed"] and not (tmp_path / "elsewhere").exists()


def test_every_run_stays_within_the_budget(world, tmp_path):
    """What is taken back of a run is what `tune` takes back of it: chosen on the half that chooses."""
    measure = {"budget": True, "keep": {"language": 0.999}}
    training = {"learning_rate": 0.03, "max_steps": 12}
    recipe = asked(world, tmp_path, measure=measure, training=training)
    found = go(world, tmp_path, ["plain"], recipe=recipe, factors=(1.0, 1e-4), seeds=2)
    assert not found["failed"] and found["rows"][0]["seeds"] == [0, 1]
    done = json.loads((tmp_path / "out" / "runs" / "plain.x1.0" / "trained.json").read_text())
    assert done["budget"]["share"] < 1
    (trial,) = (t for t in found["rows"][0]["trials"] if t["factor"] == 1)
    (at,) = [p for p in done["budget"]["points"] if p["share"] == done["budget"]["share"]]
    assert trial["kept"]["language"]["value"] == pytest.approx(at["kept"]["language"]["value"], abs=1e-4)


def test_too_few_rows_for_two_halves(world, tmp_path):
    with pytest.raises(HoldfastError, match="too few to choose"):
        go(world, tmp_path, recipe=asked(world, tmp_path, data={"validation_size": 4}))


def test_nothing_to_compare_with(world, tmp_path):
    with pytest.raises(RecipeError, match="skip_before"):
        go(world, tmp_path, recipe=asked(world, tmp_path, measure={"skip_before": True}))


def test_the_cells_have_folders_of_their_own():
    cells = [Cell(p, f, s).folder for p in ("plain", "LoRA+Replay") for f in (1 / 3, 1.0) for s in (0, 1)]
    assert len(set(cells)) == 8


def test_the_command(whole, world, tmp_path, monkeypatch, capsys):
    from tiny_run import write_recipe

    recipe = asked(world, tmp_path)
    path = write_recipe(tmp_path / "r.yaml", recipe.model_dump(mode="json"))
    words = ["compare", path, "--methods", "plain", "--factor", "1", "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and "plain" in capsys.readouterr().out


# ---- a search instead of the grid


def test_the_search_by_hand():
    """The plan itself comes first; what was told decides what comes later, and the same again in another process."""

    def walk(margins, num=24):
        trials, seen = Search("p", 0, num, has=True), []
        while cell := trials.ask():
            seen.append(cell)
            margin = margins(cell)
            trials.tell(None if margin is None else Point(cell, cell.factor, margin, ()))
        return seen

    def centre(cells):
        return float(np.exp(np.mean([np.log(c.factor) for c in cells])))

    bound = walk(lambda cell: 1 - cell.factor)
    assert len(bound) == 24 and (bound[0].factor, bound[0].strength) == (1.0, 1.0)
    assert all(0.1 <= c.factor <= 10 and 0.25 <= c.strength <= 4 for c in bound)
    assert walk(lambda cell: 1 - cell.factor) == bound
    free = walk(lambda cell: 1.0)
    assert free[:10] == bound[:10], "drawn at random"
    assert centre(bound[10:]) < 1 < 3 < centre(free[10:]), "the best that keeps is 1, without a bound 10"
    assert len(walk(lambda cell: None, num=4)) == 4
    only = Search("p", 0, 4, has=False).ask()
    assert only is not None and only.strength == 1.0


@pytest.mark.long
def test_a_search_goes_on_with_the_same_trials(world, tmp_path, monkeypatch):
    options = {"factors": None, "search": 3, "seeds": 1}
    methods = ["LoRA+KLToBase"]
    first = go(world, tmp_path, methods, **options)
    (row,) = first["rows"]
    assert len(row["trials"]) == 3 and len({t["strength"] for t in row["trials"]}) == 3
    plain, count = runs.training.trained, []

    def dies(job):
        count.append(1)
        if len(count) == 3:
            raise Killed
        return plain(job)

    monkeypatch.setattr(runs.training, "trained", dies)
    with pytest.raises(Killed):
        go(world, tmp_path, methods, "again", **options)
    monkeypatch.setattr(runs.training, "trained", lambda job: count.append(1) or plain(job))
    assert without_clock(go(world, tmp_path, methods, "again", **options)) == without_clock(first)
    assert len(count) == 4
    with pytest.raises(RecipeError, match="another recipe"):
        go(world, tmp_path, methods, **{**options, "search": 4})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": 3, "factors": (1.0,)}, "--search 3 chooses its settings itself, and --factor names some"),
        ({"search": 3, "factors": None, "strengths": (1.0,)}, "--strength names some"),
        ({"search": 0, "factors": None}, "--search 0 is no trial"),
        ({"strengths": (1.0, 0.0)}, "strength cannot be multiplied by 0"),
        ({"strengths": (-1.0,)}, "strength cannot be multiplied by -1"),
    ],
)
def test_settings_that_contradict_each_other(world, tmp_path, options, words):
    with pytest.raises(PlanError, match=words):
        go(world, tmp_path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "extra", "options"),
    [(cluster, "ray", {"ray": True}), (search, "search", {"search": 2, "factors": None})],
)
def test_an_extra_that_is_missing(world, tmp_path, monkeypatch, module, extra, options):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(HoldfastError, match=f"--{extra} needs the package") as error:
        go(world, tmp_path, **options)
    assert error.value.cure == f'Run: pip install "holdfast-lm[{extra}]".'


# ---- a full disk


def test_a_disk_without_room_fails_each_run_and_loses_nothing(world, tmp_path, monkeypatch):
    options = {"factors": (1.0,), "seeds": 1}
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    found = go(world, tmp_path, ["LoRA"], **options)
    assert list(found["failed"]) == ["LoRA, rate x 1, seed 0"] and "0.0 GB free" in str(found["failed"])
    monkeypatch.undo()
    assert not go(world, tmp_path, ["LoRA"], **options)["failed"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_disk_that_fills_up_fails_the_run_that_writes(world, tmp_path, monkeypatch):
    plain = runs.training.trained

    def fills(job):
        if job.recipe.plan == []:
            (job.run.path / "log.jsonl").symlink_to("/dev/full")
        return plain(job)

    monkeypatch.setattr(runs.training, "trained", fills)
    found = go(world, tmp_path, factors=(1.0,), seeds=1)
    assert list(found["failed"]) == ["plain, rate x 1, seed 0"] and [r["name"] for r in found["rows"]] == ["LoRA"]
    assert "log.jsonl could not be written: No space left on device." in found["failed"]["plain, rate x 1, seed 0"]


# ---- a cluster


@pytest.mark.parametrize(
    ("machines", "most", "needs"),
    [
        ([{"CPU": 2}], 6, {"num_cpus": 1}),
        ([{"CPU": 16}, {"CPU": 48}], 4, {"num_cpus": 16}),
        ([{"CPU": 16}, {"CPU": 48}], 1, {"num_cpus": 48}),
        ([{"CPU": 64}, {"CPU": 32, "GPU": 4}], 3, {"num_gpus": 1, "num_cpus": 8}),
        ([{}], 3, {"num_cpus": 1}),
    ],
)
def test_the_share_of_a_run(machines, most, needs):
    assert cluster.share(machines, most) == needs


@pytest.mark.long  # starting Ray takes longer than all that it does here
def test_a_local_ray_gives_the_same_table(whole, world, tmp_path, monkeypatch):
    """Two workers; then a driver that dies between the phases, and a serial one that finds its runs done."""
    import ray
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        alone = runs.training.trained
        monkeypatch.setattr(runs.training, "trained", None)  # nothing is trained in this process
        assert without_clock(go(world, tmp_path, ray=True)) == without_clock(whole[1])
        options = {"factors": None, "search": 2, "seeds": 1}
        searched = go(world, tmp_path, ["LoRA+KLToBase"], "search", ray=True, **options)
        broken = go(world, tmp_path, ["LoRA"], "broken", ray=True, recipe=asked(world, tmp_path, training=NAN))
        monkeypatch.setattr(runs.Comparison, "_write_down", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            go(world, tmp_path, name="killed", ray=True)
    finally:
        ray.shutdown()
    monkeypatch.undo()
    again = []
    monkeypatch.setattr(runs.training, "trained", lambda job: again.append(1) or alone(job))
    assert without_clock(go(world, tmp_path, name="killed")) == without_clock(whole[1])
    assert len(again) == 2, "the second seed of each plan"
    serial = go(world, tmp_path, ["LoRA+KLToBase"], "serial", **options)
    assert without_clock(serial) == without_clock(searched)
    same = go(world, tmp_path, ["LoRA"], "same", recipe=asked(world, tmp_path, training=NAN))
    assert broken["failed"] and broken["failed"].keys() == same["failed"].keys()
