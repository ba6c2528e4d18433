"""Tests, and what they say of a loss: kept, lost or unclear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import bdtr, bdtri, ndtr, ndtri, stdtr, stdtrit

from holdfast.errors import HoldfastError
from holdfast.measure.stats.bootstrap import quantile_ends
from holdfast.measure.stats.given import Task, alpha_of, groups_of, is_binary, numbers_of, pair_of
from holdfast.measure.stats.intervals import paired, standard_error
from holdfast.measure.stats.records import Estimate, Verdict


def mcnemar(base: ArrayLike, tuned: ArrayLike) -> float:
    """Return the exact two-sided p of 'gains and losses are equally likely' for 0/1 scores (N,)."""
    b, t = pair_of(base, tuned)
    if not is_binary(b, t):
        raise HoldfastError("McNemar's test got scores other than 0 and 1.", "Use paired() for graded scores.")
    gains, losses = int((t > b).sum()), int((t < b).sum())
    return min(1.0, 2 * float(bdtr(min(gains, losses), gains + losses, 0.5)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p values under the same names; never below the raw ones, in the same order."""
    out, running = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: (item[1], item[0]))):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        out[name] = running
    return {name: out[name] for name in p_values}


def _tango(gains: float, losses: float, n: float, diff: float) -> float:
    """Return Tango's score statistic (standard normal) of H0 'P(gain) - P(loss) = diff'."""
    b = -gains - losses + (2 * n - gains + losses) * diff
    c = -losses * diff * (1 - diff)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # P(loss) at its likeliest under H0
    top, variance = gains - losses - n * diff, n * (2 * q + diff * (1 - diff))
    return 0.0 if top == 0 else top / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, top)


def crossing(f: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of the falling f; the end it would lie beyond if there is none between low and high."""
    if f(low) <= 0:
        return low
    if f(high) >= 0:
        return high
    root: Any = brentq(f, low, high, xtol=1e-9)
    return float(root)


def _score_test(
    gains: float, losses: float, n: float, margin: float, alpha: float
) -> tuple[float, float, float, float]:
    """Return p, p_loss, lower, upper for 0/1 pairs; p_loss is the exact sign test, safe with few pairs."""
    z, d = float(ndtri(1 - alpha)), (gains - losses) / n
    p = float(ndtr(-_tango(gains, losses, n, -min(margin, 1.0))))
    p_loss = float(bdtr(round(gains), round(gains) + round(losses), 0.5))
    lower = crossing(lambda x: _tango(gains, losses, n, x) - z, -1.0, d)
    if gains == 0:  # only losses: a plain proportion, whose exact bound is the rule of three
        p = max(p, float(bdtr(round(losses), n, min(margin, 1.0))))
        lower = min(lower, -float(bdtri(round(losses), n, alpha)) if losses < n else -1.0)
    upper = crossing(lambda x: _tango(gains, losses, n, x) + z, d, 1.0)
    return p, p_loss, lower, upper if p_loss < alpha else max(upper, 0.0)


def _t_test(value: float, se: float, dof: int, margin: float, alpha: float) -> tuple[float, float, float, float]:
    """Return p, p_loss, lower, upper for graded scores or clusters."""
    if math.isinf(se):
        return 1.0, 1.0, -math.inf, math.inf
    if se == 0:
        return float(value <= -margin), float(value >= 0), value, value
    half = se * float(stdtrit(dof, 1 - alpha))
    return (
        float(stdtr(dof, -(value + margin) / se)),
        float(stdtr(dof, value / se)),
        value - half,
        value + half,
    )


def _status(value: float, lower: float, upper: float, margin: float) -> str:
    if lower > -margin:
        return "kept"
    return "lost" if upper < 0 and value < -margin else "unclear"


def _margin(margin: float) -> float:
    if not margin >= 0:
        raise HoldfastError(f"The margin is {margin}.", "Give the loss you can bear as a number >= 0, such as 0.02.")
    return float(margin)


def noninferiority(
    base: ArrayLike,
    tuned: ArrayLike,
    margin: float,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
) -> Verdict:
    """Return whether an ability was kept, lost, or whether these items (N,) cannot tell.

    'kept': the one-sided lower bound of the mean difference is above -margin.
    'lost': the one-sided upper bound is below 0 (a loss is real) and the estimate is below -margin (it is
    larger than can be borne). This holds in particular when the upper bound is below -margin.
    'unclear': neither. 'Not significant' alone is never 'kept'.

    Each bound is one-sided at `level`. 0/1 scores without clusters: Tango's score bound for 'kept' (the exact
    binomial one if nothing was gained) and the exact sign test for 'lost'; with clusters too when these show
    no spread, then with G in place of N. So no change in 20 items is not yet 'kept' at a margin of 0.02 (it
    takes 149). Otherwise: t with G-1 degrees of freedom.
    """
    margin, alpha = _margin(margin), alpha_of(level)
    b, t = pair_of(base, tuned)
    estimate = paired(b, t, clusters, level)
    group, g = groups_of(clusters, b.size)
    se = standard_error(t - b, group, g) if g > 1 or (t != b).any() else 0.0
    if is_binary(b, t) and (g == b.size or not 0 < se < math.inf):
        share = g / b.size
        result = _score_test((t > b).sum() * share, (t < b).sum() * share, g, margin, alpha)
    else:
        result = _t_test(estimate.value, se, g - 1, margin, alpha)
    p, p_loss, lower, upper = result
    return Verdict(_status(estimate.value, lower, upper, margin), p, estimate, margin, lower, upper, p_loss)


def noninferiority_draws(
    draws_of_difference: ArrayLike,
    margin: float,
    value: float | None = None,
    n: int = 0,
    level: float = 0.95,
) -> Verdict:
    """Return the verdict of noninferiority() from draws (B,) of a macro difference, or of a ratio minus 1.

    value: the estimate on the real items (default: mean of the draws). n: items, for the record only. p and
    p_loss count draws, with one added above and below, so they are never 0. Draws without spread are taken at
    their word: with few 0/1 items and no change, ask noninferiority() instead.
    """
    margin, alpha = _margin(margin), alpha_of(level)
    x = numbers_of(draws_of_difference, "draws_of_difference")
    value = float(x.mean()) if value is None else value
    lower, upper = (float(q) for q in np.quantile(x, [alpha, 1 - alpha]))
    p, p_loss = (float(1 + hit.sum()) / (x.size + 1) for hit in (x <= -margin, x >= 0))
    estimate = Estimate(value, *quantile_ends(x, level), n)
    return Verdict(_status(value, lower, upper, margin), p, estimate, margin, lower, upper, p_loss)


def verdicts(
    abilities: Mapping[str, Task], margins: Mapping[str, float] | float, level: float = 0.95
) -> dict[str, Verdict]:
    """Return one verdict per ability (base, tuned, clusters); p_loss is Holm-adjusted over the abilities.

    'lost' needs the adjusted p_loss: an alarm goes off if ANY ability is lost, so without adjustment the
    false alarms add up; with it, the chance of one or more is at most 1 - level. 'kept' is each at `level`,
    with no adjustment: the claim is that ALL are kept, and for a conjunction (intersection-union test) the
    chance of a wrong claim is at most that of its weakest part. lower and upper stay unadjusted.
    """
    out = {}
    for name, (base, tuned, clusters) in abilities.items():
        if isinstance(margins, Mapping) and name not in margins:
            raise HoldfastError(f"Ability {name!r} has no margin.", f"Add {name!r} to the margins.")
        margin = margins[name] if isinstance(margins, Mapping) else margins
        out[name] = noninferiority(base, tuned, margin, clusters, level)
    adjusted = holm({name: v.p_loss for name, v in out.items()})
    for name, v in out.items():
        doubt = v.status == "lost" and adjusted[name] >= alpha_of(level)
        out[name] = replace(v, p_loss=adjusted[name], status="unclear" if doubt else v.status)
    return out
