"""Intervals, paired tests and verdicts for small evaluations.

Legend: N items, G clusters (items that share a passage or template), d_i = tuned_i - base_i on the same item.

Sources: Miller 2024 (arXiv 2411.00640) for clustered and paired errors; Wilson 1927; Kish 1965 and Dean & Pagano 2015
(Wilson with the effective number of items); Satterthwaite 1946; McNemar 1947; Tango 1998 (score interval of a paired
difference of proportions); Holm 1979; Berger 1982 (intersection-union tests).

Scores are numbers where higher is better; accuracies are 0/1. Every bootstrap function is deterministic in
`seed`, and sorts its items by value first, so the order of items never matters. Each task draws from its own
stream, keyed by its name, so the order of tasks, or adding one, does not change the others.
"""

from holdfast.measure.stats.bootstrap import hierarchical, macro_difference, macro_draws, retention
from holdfast.measure.stats.calibration import brier, ece
from holdfast.measure.stats.detect import detectable, power
from holdfast.measure.stats.given import Task
from holdfast.measure.stats.intervals import (
    average,
    average_change,
    change,
    mean,
    measurable,
    normalise,
    paired,
    pooled,
    seeds,
    share,
)
from holdfast.measure.stats.records import Estimate, Ratio, Verdict
from holdfast.measure.stats.runs import mean_of_runs, retention_of_runs
from holdfast.measure.stats.verdict import holm, mcnemar, noninferiority, noninferiority_draws, verdicts

__all__ = (
    "Estimate",
    "Ratio",
    "Task",
    "Verdict",
    "average",
    "average_change",
    "brier",
    "change",
    "detectable",
    "ece",
    "hierarchical",
    "holm",
    "macro_difference",
    "macro_draws",
    "mcnemar",
    "mean",
    "mean_of_runs",
    "measurable",
    "noninferiority",
    "noninferiority_draws",
    "normalise",
    "paired",
    "pooled",
    "power",
    "retention",
    "retention_of_runs",
    "seeds",
    "share",
    "verdicts",
)
