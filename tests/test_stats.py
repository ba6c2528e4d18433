"""Statistics: hand-computed values, error rates by simulation, and exact zeros for base against base."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats as reference

from holdfast.errors import HoldfastError
from holdfast.measure import stats
from holdfast.measure.stats.intervals import t_interval


def binary_pairs(rng, n, loss, gain, sims=1):
    """Base and tuned 0/1 scores (sims, n) with P(right to wrong) = loss, P(wrong to right) = gain."""
    u = rng.random((sims, n))
    other = rng.random((sims, n)) < 0.6
    base = np.where(u < loss, 1, np.where(u < loss + gain, 0, other)).astype(float)
    tuned = np.where(u < loss, 0, np.where(u < loss + gain, 1, other)).astype(float)
    return base, tuned


def rate(status, base, tuned, **kw):
    return np.mean([stats.noninferiority(b, t, **kw).status == status for b, t in zip(base, tuned, strict=True)])


# ---------------------------------------------------------------- one mean


def test_mean_by_hand():
    # 1, 2, 3, 6: mean 3; squares 4+1+0+9 = 14; sd = sqrt(14/3); SE = sd/2 = 1.0801; t(.975, 3) = 3.1824
    e = stats.mean([1, 2, 3, 6])
    assert e.value == 3 and e.n == 4
    assert e.high - 3 == pytest.approx(3 - e.low) == pytest.approx(3.1824 * 1.0801, abs=1e-3)


def test_clustered_mean_by_hand():
    # a: 1, 2; b: 3, 6; deviations -2 -1 | 0 3; sums -3, 3; SE = sqrt(2/1 * 18)/4 = 1.5; t(.975, 1) = 12.7062
    e = stats.mean([1, 3, 2, 6], clusters=["a", "b", "a", "b"])
    assert e.high - e.value == pytest.approx(12.7062 * 1.5, rel=1e-4)


def test_clustered_error_equals_naive_for_singletons():
    x = np.random.default_rng(1).normal(size=50)
    assert stats.mean(x, clusters=np.arange(50)) == stats.mean(x)
    naive = x.std(ddof=1) / math.sqrt(50) * reference.t.ppf(0.975, 49)
    assert stats.mean(x).high - x.mean() == pytest.approx(naive)


def test_copied_items_do_not_narrow_a_clustered_interval():
    x, names = np.random.default_rng(2).normal(size=30), np.arange(30)
    once, thrice = stats.mean(x), stats.mean(np.tile(x, 3), clusters=np.tile(names, 3))
    assert thrice.low == pytest.approx(once.low) and thrice.high == pytest.approx(once.high)
    assert thrice.n == 90


@pytest.mark.parametrize("right,n", [(0, 10), (3, 20), (20, 20), (1, 1), (0, 1)])
def test_binary_mean_is_wilson(right, n):
    e = stats.mean([1] * right + [0] * (n - right))
    want = reference.binomtest(right, n).proportion_ci(method="wilson")
    assert (e.low, e.high) == pytest.approx((want.low, want.high), abs=1e-12)


def test_one_item_and_constants():
    assert stats.mean([0.3]) == stats.Estimate(0.3, -math.inf, math.inf, 1)
    assert stats.mean([0.1] * 7) == stats.Estimate(0.1, 0.1, 0.1, 7)
    # all right in two clusters says as much as two items, in one cluster as one
    assert stats.mean([1] * 6, clusters=[0, 0, 0, 1, 1, 1]).low == stats.mean([1, 1]).low
    assert stats.mean([1, 1, 1], clusters=[0, 0, 0]).low == stats.mean([1]).low
    spread = stats.mean([1, 1, 0, 0, 1, 0], clusters=[0, 0, 1, 1, 2, 2])
    # cluster means 1, 0, .5: SE = .288675, so as sure as .25/.083333 = 3 items; t(.975, 2) = 4.3027, z^2 = 18.513:
    # centre .5, half = 4.3027/(1 + 6.171) * sqrt(.25/3 + 18.513/36) = .46383
    assert (spread.low, spread.high) == pytest.approx((0.5 - 0.46383, 0.5 + 0.46383), abs=1e-4)


# ---------------------------------------------------------------- scores between 0 and 1


def test_share_by_hand():
    # 0, .5, 1, 1: mean .625, SE = sqrt(.171875 * 4/3)/2 = .239357, as sure as .234375/.057292 = 4.0909 0/1 scores;
    # t(.975, 3) = 3.18245, t^2 = 10.128: centre (.625 + 10.128/8.1818)/(1 + 2.47572) = .535965,
    # half = 3.18245/3.47572 * sqrt(.057292 + 10.128/66.942) = .418168
    e = stats.share([0, 0.5, 1, 1])
    assert (e.value, e.n) == (0.625, 4)
    assert (e.low, e.high) == pytest.approx((0.535965 - 0.418168, 0.535965 + 0.418168), abs=1e-5)


def test_share_is_wilson_for_plain_marks_and_near_t_for_many_graded_scores():
    marks = [1] * 7 + [0] * 3
    assert stats.share(marks) == stats.mean(marks)
    x = np.random.default_rng(30).beta(4, 4, 400)
    a, b = stats.share(x), stats.mean(x)
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=2e-4) and a != b


def test_no_spread_is_no_proof():
    """Graded scores that are all alike say as much as G marks, however many items share a cluster."""
    alike = stats.share([0.5] * 8, clusters=[0, 0, 1, 1, 2, 2, 3, 3])
    want = reference.binomtest(2, 4).proportion_ci(method="wilson")
    assert (alike.low, alike.high) == pytest.approx((want.low, want.high))
    assert stats.share([0.3]).low > 0 and stats.share([0.3]).high < 1  # one score: Wilson with n = 1
    even = stats.share([1, 0, 0, 1, 1, 0], clusters=["a", "a", "b", "b", "c", "c"])  # each cluster: one half
    assert even.high - even.low > 0.6


def test_change_by_hand():
    # d = -1, 0, 0, -1: (1 + d)/2 = 0, .5, .5, 0: mean .25, SE = .288675/2 = .144338, n = .1875/.0208333 = 9;
    # t^2 = 10.128: centre (.25 + 10.128/18)/(1 + 1.12533) = .382375, half = 3.18245/2.12533 * sqrt(.0208333 +
    # 10.128/324) = .341738 -> .040637 to .724113 -> -.918726 to .448226, where t alone gives -1.419 to .419
    e = stats.change([1, 1, 0, 1], [0, 1, 0, 0])
    assert e.value == -0.5 and (e.low, e.high) == pytest.approx((-0.918726, 0.448226), abs=1e-4)
    assert stats.paired([1, 1, 0, 1], [0, 1, 0, 0]).low < -1.4
    up, down = stats.change([0, 0, 0.5, 1], [1, 0.5, 0.5, 1]), stats.change([1, 0.5, 0.5, 1], [0, 0, 0.5, 1])
    assert (up.low, up.high) == pytest.approx((-down.high, -down.low))
    all_lost = stats.change([1] * 5, [0] * 5)
    assert all_lost.low == -1 and all_lost.high == pytest.approx(-1 + 2 * (1 - reference.binomtest(
        5, 5).proportion_ci(method="wilson").low))  # fmt: skip


def test_average_by_hand():
    # marks 1 1 0 0 and 1 1 1 0: variances .25/3 and .1875/3; SE^2 = (.083333 + .0625)/4 = .0364583, mean .625,
    # n = .234375/.0364583 = 6.42857; degrees of freedom .145833^2/(.083333^2/3 + .0625^2/3) = 5.88; t = 2.4592
    e = stats.average([([1, 1, 0, 0], None), ([1, 1, 1, 0], None)])
    t, n = reference.t.ppf(0.975, 5.88), 6.428571
    centre = (0.625 + t * t / (2 * n)) / (1 + t * t / n)
    half = t / (1 + t * t / n) * math.sqrt(0.0364583 + t * t / (4 * n * n))
    assert e.value == 0.625 and e.n == 8
    assert (e.low, e.high) == pytest.approx((centre - half, centre + half), abs=1e-5)


def test_average_of_one_task_is_its_share_and_of_perfect_tasks_is_not_certain():
    x = ([0, 0.5, 1, 1], None)
    assert stats.average([x]) == stats.share(*x)
    assert stats.average_change([([1, 1, 0], [1, 0, 0], None)]) == stats.change([1, 1, 0], [1, 0, 0])
    perfect = stats.average([([1] * 6, None), ([1] * 6, None)])
    assert (perfect.low, perfect.high) == (stats.share([1] * 12).low, 1)
    # a task without an error adds doubt: the other alone would have half this variance's root
    mixed = stats.average([([1] * 6, None), ([1, 1, 1, 0, 0, 0], None)])
    alone = stats.share([1, 1, 1, 0, 0, 0])
    assert mixed.high - mixed.low > (alone.high - alone.low) / 2
    same = ([1, 0, 0.5], [1, 0, 0.5], None)
    assert stats.average_change([same, same]) == stats.Estimate(0.0, 0.0, 0.0, 6)


def random_scores(rng, n):
    """Scores of one of the kinds that suites have, often at the bounds."""
    kind, p = rng.integers(6), rng.choice([0.0, 0.02, 0.5, 0.97, 1.0])
    return [
        (rng.random(n) < p).astype(float),
        rng.binomial(3, p, n) / 3,
        np.exp(-rng.exponential(1.0, n)),
        np.where(rng.random(n) < 0.5, p, 1.0),
        np.full(n, p),
        1 - rng.random(n) * 1e-12,
    ][kind]


def test_every_interval_stays_within_bounds_and_holds_its_estimate():
    rng = np.random.default_rng(31)
    for _ in range(1500):
        tasks = []
        for _ in range(rng.integers(1, 5)):
            n = int(rng.choice([1, 2, 3, 5, 12, 40]))
            clusters = None if rng.random() < 0.4 else rng.integers(0, rng.integers(1, n + 1), n)
            tasks.append((random_scores(rng, n), random_scores(rng, n), clusters))
        level = float(rng.choice([0.5, 0.95, 0.999]))
        found = [(stats.average([(b, c) for b, _, c in tasks], level), 0), (stats.average_change(tasks, level), -1)]
        found += [(stats.share(b, c, level), 0) for b, _, c in tasks] + [(stats.change(*t, level), -1) for t in tasks]
        for e, least in found:
            assert least <= e.low <= e.value <= e.high <= 1, (e, tasks)
        values = [float(np.mean(b)) for b, _, _ in tasks]
        assert found[0][0].value == pytest.approx(float(np.mean(values)), abs=1e-12)


def test_scores_outside_are_refused():
    for call in (lambda: stats.share([0.5, 1.2]), lambda: stats.change([0, 1], [0, -0.1]),
                 lambda: stats.average([([0.5], None), ([3.0], None)])):  # fmt: skip
        with pytest.raises(HoldfastError, match="score of item") as e:
            call()
        assert "between 0 and 1" in e.value.cure
    assert stats.share([1 + 1e-12, 1]).high == 1  # rounding is no mistake


@pytest.mark.parametrize("g", [10, 30])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_shares_cover_what_they_should(g, p):
    """Clusters of four 0/1 scores that share a mean; 600 runs at 95 % have an error of 0.9 %."""
    rng, names = np.random.default_rng(32), np.repeat(np.arange(g), 4)
    hits = cut = 0
    for _ in range(600):
        x = (rng.random((g, 4)) < rng.beta(p * 7 / 3, (1 - p) * 7 / 3, g)[:, None]).astype(float).ravel()
        e, t = stats.share(x, names), t_interval(x, names, g, 0.95)
        hits, cut = hits + (e.low <= p <= e.high), cut + (t.low <= p <= t.high)
    assert hits / 600 >= 0.925
    if p != 0.5:
        assert hits > cut  # cutting the t interval to 0..1 would cover less


def test_records_survive_strict_json():
    for record in (
        stats.mean([0.3]),
        stats.mean([1, 0, 1]),
        stats.Ratio(1.0, 0.9, 1.1, True),
        stats.noninferiority([0.5], [0.2], 0.1),
    ):
        text = json.dumps(record.to_dict(), allow_nan=False)
        assert type(record).from_dict(json.loads(text)) == record
    gone = stats.Ratio.from_dict(stats.Ratio(math.nan, math.nan, math.nan, False).to_dict())
    assert math.isnan(gone.value) and not gone.defined


# ---------------------------------------------------------------- paired


def test_paired_by_hand():
    # d = -1, 0, 0, -1: mean -.5; squares 4 * .25 = 1; sd = sqrt(1/3); SE = .288675; t(.975, 3) = 3.1824
    e = stats.paired([1, 1, 0, 1], [0, 1, 0, 0])
    assert e.value == -0.5 and e.high + 0.5 == pytest.approx(3.1824 * 0.288675, rel=1e-4)


def test_paired_coverage():
    rng, n, sims = np.random.default_rng(3), 200, 3000
    base, tuned = binary_pairs(rng, n, 0.12, 0.06, sims)
    hits = 0
    for b, t in zip(base, tuned, strict=True):
        e = stats.paired(b, t)
        hits += e.low <= -0.06 <= e.high
    assert 0.93 <= hits / sims <= 0.97


def test_clustered_paired_coverage_where_the_naive_one_fails():
    rng, g, size, sims = np.random.default_rng(4), 40, 5, 1500
    names = np.repeat(np.arange(g), size)
    robust = naive = 0
    for _ in range(sims):
        d = np.repeat(rng.normal(size=g), size) + rng.normal(size=g * size)
        e, f = stats.paired(np.zeros(g * size), d, names), stats.paired(np.zeros(g * size), d)
        robust, naive = robust + (e.low <= 0 <= e.high), naive + (f.low <= 0 <= f.high)
    assert 0.93 <= robust / sims <= 0.97 and naive / sims < 0.85


def test_mcnemar():
    base = [1] * 6 + [0] * 2 + [1] * 5
    tuned = [0] * 6 + [1] * 2 + [1] * 5
    # b = 6, c = 2: 2 * P(X <= 2; 8, 1/2) = 2 * (1 + 8 + 28)/256 = 0.2890625
    assert stats.mcnemar(base, tuned) == pytest.approx(0.2890625)
    assert stats.mcnemar([1, 0, 1, 0, 1], [0, 1, 0, 1, 1]) == 1
    assert stats.mcnemar([1, 0], [1, 0]) == 1


# ---------------------------------------------------------------- base against base


def test_base_against_base_is_exactly_zero_everywhere():
    rng = np.random.default_rng(5)
    binary, graded = (rng.random(150) < 0.6).astype(float), rng.random(150)
    names, one = rng.integers(0, 30, 150), np.array([0.4])
    for x, c in ((binary, None), (graded, None), (binary, names), (graded, names), (one, None)):
        assert stats.paired(x, x, c) == stats.Estimate(0.0, 0.0, 0.0, x.size)
        tasks = {"a": (x, x, c), "b": (binary, binary, None)}
        chance = {"a": 0.25, "b": 0.5}
        assert stats.macro_difference(tasks, chance) == stats.Estimate(0.0, 0.0, 0.0, x.size + 150)
        v = stats.noninferiority(x, x, 0.02, None if x is binary else c)
        assert (v.status, v.estimate.value, v.p_loss) == ("kept", 0.0, 1.0) and v.p < 0.05
    assert stats.retention({"b": (graded, graded, names)}, {"b": 0.1}) == stats.Ratio(1.0, 1.0, 1.0, True)
    assert stats.mcnemar(binary, binary) == 1
    assert stats.hierarchical([(graded, graded)] * 3) == stats.Estimate(0.0, 0.0, 0.0, 450)
    both = stats.verdicts({"a": (binary, binary, None), "b": (graded, graded, names)}, 0.05)
    assert [v.status for v in both.values()] == ["kept", "kept"]
    _, _, drawn, n = stats.macro_draws({"b": (binary, binary, None)}, {"b": 0.5})
    assert not drawn.any() and stats.noninferiority_draws(drawn, 0.02, n=n).status == "kept"


def test_no_change_in_few_items_is_not_proof():
    x = [1, 0] * 10
    assert stats.noninferiority(x, x, 0.02).status == "unclear"
    # (1 - .02)^n < .05 needs n > 2.9957/.0202 = 148.3
    assert stats.noninferiority(x * 7 + [1] * 8, x * 7 + [1] * 8, 0.02).status == "unclear"
    assert stats.noninferiority(x * 7 + [1] * 9, x * 7 + [1] * 9, 0.02).status == "kept"
    # 200 items from 20 passages say as much as 20
    assert stats.noninferiority(x * 10, x * 10, 0.02, np.repeat(np.arange(20), 10)).status == "unclear"


# ---------------------------------------------------------------- chance, macro, retention


def test_normalise():
    assert stats.normalise(0.25, 0.25) == 0 and stats.normalise(1.0, 0.25) == 1
    assert stats.normalise(0.7, 0.4) == pytest.approx(0.5)  # .3 / .6


def test_constant_guesser_is_zero_after_chance_correction():
    truth = np.random.default_rng(6).integers(0, 4, 20000)
    guesser = (truth == 2).astype(float)
    assert abs(stats.normalise(stats.mean(guesser).value, 0.25)) < 0.015
    assert not stats.measurable(guesser[:400], None, 0.25)


def test_measurable():
    assert not stats.measurable([1] * 59 + [0] * 41, None, 0.5)  # .59 - 2 * .0494 = .491
    assert stats.measurable([1] * 62 + [0] * 38, None, 0.5)
    assert not stats.measurable([1], None, 0.5) and not stats.measurable([1, 1], None, 0.5)
    assert stats.measurable([1] * 10, None, 0.5)  # Wilson, z = 2: 10/14 = .714
    assert not stats.measurable([1] * 10, [0] * 5 + [1] * 5, 0.5)  # two passages: 2/6 = .333
    assert not stats.measurable([1] + [0] * 99, None, 0.0)  # .01 < 2 * .01
    assert not stats.measurable([0] * 100, None, 0.0)
    x = np.random.default_rng(7).normal(0.3, 1, 100)
    assert stats.measurable(x, None, 0.0) == (x.mean() >= 2 * x.std(ddof=1) / 10)


def test_macro_difference_by_hand():
    # a: d mean -.5, chance .5 -> -1; b: d mean +.25, chance 0 -> +.25; macro -.375 although b has more items
    a = ([1, 1, 1, 0], [0, 1, 0, 0], None)
    b = ([0] * 8, [1, 1] + [0] * 6, None)
    e = stats.macro_difference({"a": a, "b": b}, {"a": 0.5, "b": 0.0})
    assert e.value == -0.375 and e.n == 12 and e.low < -0.375 < e.high


@pytest.mark.parametrize("graded", [False, True])
def test_macro_interval_agrees_with_theory(graded):
    # bootstrap sd, widened by sqrt(n/(n-1)), is the paired SE; two tasks, chance .5: sqrt(SEa^2 + SEb^2)/2/.5
    rng, tasks, se = np.random.default_rng(8), {}, 0.0
    for name in "ab":
        base, tuned = binary_pairs(rng, 60, 0.2, 0.1)
        d = (rng.normal(size=60) if graded else 0) + tuned[0] - base[0]
        tasks[name] = (base[0], base[0] + d, None)
        se += d.var(ddof=1) / 60
    drawn = stats.macro_draws(tasks, {"a": 0.5, "b": 0.5}, draws=20000)[2]
    assert drawn.std() == pytest.approx(math.sqrt(se), rel=0.03)
    e = stats.macro_difference(tasks, {"a": 0.5, "b": 0.5}, draws=20000)
    assert e.high - e.low == pytest.approx(2 * 1.96 * math.sqrt(se), rel=0.05)


def test_bootstrap_has_the_small_sample_factor():
    # d = 0, 1: sd sqrt(.5), SE .5; a plain bootstrap of two items has sd .5 / sqrt(2)
    drawn = stats.macro_draws({"a": ([0, 0], [0, 1], None)}, {"a": 0.0}, draws=20000)[2]
    assert drawn.std() == pytest.approx(0.5, rel=0.03)


def test_clusters_and_chunks_of_the_bootstrap():
    # many distinct values take the index path, and 3000 clusters take it in several pieces
    rng = np.random.default_rng(9)
    d, names = rng.normal(size=6000), np.repeat(np.arange(3000), 2)
    drawn = stats.macro_draws({"a": (np.zeros(6000), d, names)}, {"a": 0.0}, draws=2000)[2]
    se = d.reshape(3000, 2).mean(1).std(ddof=1) / math.sqrt(3000)
    assert drawn.std() == pytest.approx(se, rel=0.08) and drawn.mean() == pytest.approx(d.mean(), abs=3 * se / 40)


@pytest.mark.parametrize("graded", [False, True])
def test_bootstrap_is_seeded_and_blind_to_order(graded):
    rng = np.random.default_rng(10)
    base, tuned = (v[0] for v in binary_pairs(rng, 120, 0.2, 0.1))
    tuned = tuned + graded * rng.random(120)
    names, p = rng.integers(0, 40, 120), rng.permutation(120)
    chance = {"a": 0.1, "b": 0.2}
    tasks = {"a": (base, tuned, None), "b": (base, tuned, names)}
    mixed = {"b": (base[p], tuned[p], names[p]), "a": (base[p], tuned[p], None)}
    for f in (stats.macro_difference, stats.retention):
        one, two, other = f(tasks, chance), f(mixed, chance), f(tasks, chance, seed=1)
        assert one == f(tasks, chance)
        assert (two.low, two.high) == pytest.approx((one.low, one.high), abs=1e-9)
        assert (other.low, other.high) != (one.low, one.high)
    runs = [(base, tuned), (base, rng.permutation(tuned))]
    one = stats.hierarchical(runs)
    two = stats.hierarchical([(b[p], t[p]) for b, t in runs])
    assert one == stats.hierarchical(runs) != stats.hierarchical(runs, seed=1)
    assert (two.low, two.high) == pytest.approx((one.low, one.high), abs=1e-9)


def test_a_task_of_one_item_widens_and_does_not_crash():
    rng = np.random.default_rng(11)
    base, tuned = (v[0] for v in binary_pairs(rng, 100, 0.1, 0.1))
    e = stats.macro_difference({"a": (base, tuned, None), "b": ([1], [0], None)}, {"a": 0.0, "b": 0.0})
    assert e.high - e.low > 0.9


def test_retention_by_hand():
    # base .8, tuned .5, chance .2: (.3/.8) / (.6/.8) = .5
    base, tuned = np.array([1] * 80 + [0] * 20), np.array([1] * 50 + [0] * 50)
    r = stats.retention({"a": (base, tuned, None)}, {"a": 0.2})
    assert r.defined and r.value == pytest.approx(0.5) and 0.3 < r.low < 0.5 < r.high < 0.7
    # base .24 is above chance .2 by less than 2 * sqrt(.24 * .76/100) = .085
    weak = stats.retention({"a": (np.array([1] * 24 + [0] * 76), tuned, None)}, {"a": 0.2})
    assert not weak.defined and math.isnan(weak.value) and weak.to_dict()["low"] is None
    assert not stats.retention({"a": ([0] * 9, [1] * 9, None)}, {"a": 0.0}).defined


def test_retention_coverage():
    rng, hits = np.random.default_rng(12), 0
    base, tuned = binary_pairs(rng, 200, 0.15, 0.05, 500)  # P(base right) = .15 + .8 * .6 = .63, tuned .53
    for b, t in zip(base, tuned, strict=True):
        r = stats.retention({"a": (b, t, None)}, {"a": 0.25}, draws=1000)
        hits += r.low <= 0.28 / 0.38 <= r.high
    assert 0.92 <= hits / 500 <= 0.98


# ---------------------------------------------------------------- seeds


def test_seeds_by_hand():
    # .1, .2, .3: mean .2, sd .1, SE .057735; t(.975, 2) = 4.3027
    e = stats.seeds([0.1, 0.2, 0.3])
    assert e.value == pytest.approx(0.2) and e.high - 0.2 == pytest.approx(4.3027 * 0.057735, rel=1e-4)
    assert stats.seeds([0.4]).high == math.inf and stats.seeds([1, 1]) == stats.Estimate(1.0, 1.0, 1.0, 2)


def test_hierarchical_sees_seed_spread_and_shared_items():
    rng = np.random.default_rng(13)
    items = rng.normal(size=100)  # SE of the items alone: .1
    zero = np.zeros(100)
    same = stats.hierarchical([(zero, items)] * 4)
    assert (same.high - same.low) / 3.92 == pytest.approx(0.1 * items.std() * math.sqrt(4 / 3), rel=0.1)
    shifted = stats.hierarchical([(zero, items + s) for s in (-0.5, -0.2, 0.2, 0.5)])
    assert shifted.high - shifted.low > 1.5 * (same.high - same.low)
    assert shifted.value == pytest.approx(items.mean())
    single = stats.hierarchical([(zero, items)])
    assert (single.high - single.low) / 3.92 == pytest.approx(items.std(ddof=1) / 10, rel=0.1)


# ---------------------------------------------------------------- verdicts


def test_tango_bounds_by_hand_and_by_their_definition():
    # no change, n = 100, below: (1 - x)^100 = .05 -> x = 1 - exp(-2.995732/100) = .029513
    # above: 100 x/(1 - x) = z^2 -> x = z^2/(100 + z^2) = 2.7055/102.7055 = .026343
    x = [1.0, 0.0] * 50
    v = stats.noninferiority(x, x, 0.05)
    assert v.lower == pytest.approx(-0.029513, abs=1e-5) and v.upper == pytest.approx(0.026343, abs=1e-5)
    # p: the larger of .95^100 = .0059 and P(Z > sqrt(100 * .05/.95) = 2.2942) = .01089
    assert v.p == pytest.approx(0.01089, abs=1e-5)
    # the bound is the margin at which p reaches .05, and swapping the models mirrors it
    base, tuned = (a[0] for a in binary_pairs(np.random.default_rng(14), 150, 0.15, 0.05))
    v, w = stats.noninferiority(base, tuned, 0.05), stats.noninferiority(tuned, base, 0.05)
    assert stats.noninferiority(base, tuned, -v.lower).p == pytest.approx(0.05, abs=1e-6)
    assert w.lower == pytest.approx(-v.upper, abs=1e-6) and v.upper < 0


@pytest.mark.parametrize("n,loss,gain", [(200, 0.1, 0.1), (100, 0.06, 0.06), (20, 0.1, 0.1)])
def test_false_alarm(n, loss, gain):
    base, tuned = binary_pairs(np.random.default_rng(15), n, loss, gain, 1500)
    assert rate("lost", base, tuned, margin=0.05) <= 0.05


@pytest.mark.parametrize("n,gain,margin", [(200, 0.1, 0.05), (400, 0.05, 0.02), (140, 0.0, 0.02)])
def test_wrongly_kept_at_a_true_loss_of_the_margin(n, gain, margin):
    # 2000 runs at 5 %: two standard errors are 1 %; with no gains at all the score bound alone gives 7 %
    base, tuned = binary_pairs(np.random.default_rng(16), n, gain + margin, gain, 2000)
    assert rate("kept", base, tuned, margin=margin) <= 0.06


def test_error_rates_of_graded_scores():
    rng = np.random.default_rng(17)
    zero = np.zeros((1500, 60))
    d = rng.normal(0, 0.2, (1500, 60))
    assert rate("lost", zero, d, margin=0.05) <= 0.05
    assert 0.03 <= rate("kept", zero, d - 0.05, margin=0.05) <= 0.065


def test_power_on_planted_loss():
    base, tuned = binary_pairs(np.random.default_rng(18), 200, 0.15, 0.05, 500)
    found = rate("lost", base, tuned, margin=0.02)
    assert found > 0.85
    assert rate("kept", base, tuned, margin=0.02) == 0
    base, tuned = binary_pairs(np.random.default_rng(19), 400, 0.03, 0.03, 500)
    assert rate("kept", base, tuned, margin=0.05) > 0.9


def test_status_needs_both_a_real_and_a_large_loss():
    n = 1000
    small = np.r_[np.zeros(15), np.ones(n - 15)]  # 15 losses of 1000: real (p = 2^-15) but within 5 points
    v = stats.noninferiority(np.ones(n), small, 0.05)
    assert v.status == "kept" and v.p_loss == pytest.approx(2**-15)
    assert stats.noninferiority(np.ones(n), small, 0.01).status == "lost"
    assert stats.noninferiority([1] * 10, [0] * 2 + [1] * 8, 0.05).status == "unclear"  # -.2, sign test .25
    assert stats.noninferiority([0.5], [0.1], 0.05).status == "unclear"  # one graded item: nothing known
    assert stats.noninferiority([1, 1, 1, 1], [0, 0, 1, 1], 0.05, clusters=[0, 0, 0, 0]).status == "unclear"


def test_verdict_from_draws():
    x = np.linspace(-0.10, -0.02, 999)
    v = stats.noninferiority_draws(x, 0.05, n=7)
    # draws <= -.05 are the lower 5/8: 625 of 999 up to the grid; none >= 0: 1/1000
    assert v.status == "lost" and v.p == pytest.approx(0.625, abs=0.002) and v.p_loss == 0.001
    assert v.lower == pytest.approx(-0.096) and v.upper == pytest.approx(-0.024) and v.estimate.n == 7
    assert stats.noninferiority_draws(x, 0.1, value=-0.06).status == "kept"
    assert stats.noninferiority_draws(x + 0.05, 0.03).status == "unclear"


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 -> 4*.01, 3*.02, 2*.03, 1*.04 -> .04 .06 .06 .04, made monotone .04 .06 .06 .06
    out = stats.holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert list(out) == ["d", "a", "c", "b"]
    assert out == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert stats.holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0} and stats.holm({}) == {}


def test_holm_is_monotone():
    p = dict(enumerate(np.random.default_rng(20).random(30) ** 3))
    out = stats.holm(p)
    order = sorted(p, key=p.get)
    assert all(out[a] <= out[b] for a, b in itertools.pairwise(order))
    assert all(p[k] <= out[k] <= 1 for k in p)


def test_verdicts_bound_the_family_and_still_find_the_loss():
    rng, wrong, found, sims, k = np.random.default_rng(21), 0, 0, 150, 12
    raw = 0
    for _ in range(sims):
        base, tuned = binary_pairs(rng, 100, 0.15, 0.15, k)
        tasks = {str(i): (base[i], tuned[i], None) for i in range(k)}
        bad = binary_pairs(rng, 100, 0.4, 0.1)
        tasks["bad"] = (bad[0][0], bad[1][0], None)
        out = stats.verdicts(tasks, 0.02)
        wrong += any(v.status == "lost" for name, v in out.items() if name != "bad")
        raw += rate("lost", base, tuned, margin=0.02) > 0
        found += out["bad"].status == "lost"
    assert wrong / sims <= 0.05 and raw / sims > 0.2 and found / sims > 0.8


def test_kept_is_not_adjusted_over_abilities():
    base, tuned = (a[0] for a in binary_pairs(np.random.default_rng(22), 400, 0.05, 0.05))
    alone = stats.noninferiority(base, tuned, 0.05)
    many = stats.verdicts({str(i): (base, tuned, None) for i in range(20)}, {str(i): 0.05 for i in range(20)})
    assert alone.status == "kept" and {v.status for v in many.values()} == {"kept"}


# ---------------------------------------------------------------- calibration, power, errors


def test_calibration_by_hand():
    # bins of width .5: {.2, .4} marks 0, 1 -> |.5 - .3| = .2; {.9, .7} marks 1, 1 -> |1 - .8| = .2; ECE .2
    prob, correct = [0.2, 0.4, 0.9, 0.7], [0, 1, 1, 1]
    assert stats.ece(prob, correct, bins=2) == pytest.approx(0.2)
    # .04 + .36 + .01 + .09 = .5, over 4
    assert stats.brier(prob, correct) == pytest.approx(0.125)
    assert stats.ece([1.0, 0.0], [1, 0]) == 0 == stats.brier([1.0, 0.0], [1, 0])
    assert stats.ece([0.5, 0.2], [1, 0], bins=2) == pytest.approx(0.15)  # .5 is in the lower bin: (.5 - .2)/2


def test_power_by_hand():
    # (1.96 + .8416)^2 * (.1 - .0009) / .0009 = 7.849 * 110.1 = 864 items for 3 points with power .8
    assert stats.power(864, 0.1, 0.03) == pytest.approx(0.8, abs=0.001)
    assert stats.detectable(864, 0.1, power=0.8) == pytest.approx(0.03, abs=1e-4)
    assert 0.06 < stats.detectable(200, 0.1, power=0.8) < stats.detectable(200, 0.2, power=0.8) < 0.09
    n = [stats.detectable(n, 0.15) for n in (5, 20, 100, 1000)]
    assert n == sorted(n, reverse=True) and n[0] < 1
    assert stats.power(50, 0.1, 1.0) == 1 and stats.power(50, 0.0, 0.0) == 0


def test_power_matches_simulation():
    base, tuned = binary_pairs(np.random.default_rng(23), 300, 0.11, 0.05, 1500)
    found = np.mean([stats.paired(b, t).high < 0 for b, t in zip(base, tuned, strict=True)])
    assert found == pytest.approx(stats.power(300, 0.16, 0.06), abs=0.04)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: stats.paired([1, 0], [1]), "base has 2 scores and tuned has 1"),
        (lambda: stats.mean([]), "x has shape"),
        (lambda: stats.mean([1.0, math.nan]), "nan at item 1"),
        (lambda: stats.mean([1, 0], clusters=[1]), "1 cluster names for 2 scores"),
        (lambda: stats.mean([1, 0], level=95), "level is 95"),
        (lambda: stats.mcnemar([0.5], [1]), "other than 0 and 1"),
        (lambda: stats.macro_difference({}, {}), "no task"),
        (lambda: stats.macro_difference({"a": ([1], [1], None)}, {}), "'a' has no chance level"),
        (lambda: stats.retention({"a": ([1], [1], None)}, {"a": 1.0}), "chance level of 'a' is 1.0"),
        (lambda: stats.noninferiority([1], [1], -0.1), "margin is -0.1"),
        (lambda: stats.verdicts({"a": ([1], [1], None)}, {}), "'a' has no margin"),
        (lambda: stats.hierarchical([([1], [1]), ([1, 0], [1, 0])]), "[1, 2] items"),
        (lambda: stats.hierarchical([]), "0 runs"),
        (lambda: stats.brier([1.2], [1]), "do not fit"),
        (lambda: stats.power(0, 0.1, 0.1), "n=0"),
        (lambda: stats.detectable(10, 0.1, power=0.2), "power is 0.2"),
    ],
)
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(HoldfastError) as e:
        call()
    assert words in str(e.value) and e.value.cure
