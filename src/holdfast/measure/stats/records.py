"""What statistics give back: plain records that survive strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Record:
    """to_dict and from_dict that survive strict JSON: what is not finite becomes None and comes back."""

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]):
        missing = {"low": -math.inf, "lower": -math.inf, "high": math.inf, "upper": math.inf}
        full: dict[str, Any] = {k: missing.get(k, math.nan) if v is None else v for k, v in data.items()}
        if isinstance(full.get("estimate"), Mapping):
            full["estimate"] = Estimate.from_dict(full["estimate"])
        return cls(**full)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Estimate(Record):
    """A value, its two-sided interval and the number of items. Spread unknown: low -inf, high inf."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Ratio(Record):
    """A retention ratio (1 = nothing lost). If not `defined`, the numbers are nan: report a difference."""

    value: float
    low: float
    high: float
    defined: bool


@dataclass(frozen=True)
class Verdict(Record):
    """What is known about one loss, in the units of the score.

    status: 'kept', 'lost' or 'unclear'. p: one-sided p of H0 'difference <= -margin' (small = kept).
    p_loss: one-sided p of H0 'difference >= 0' (small = a real loss). estimate: two-sided interval of the
    difference. lower, upper: the one-sided bounds, each at the level of the test, that decided the status.
    """

    status: str
    p: float
    estimate: Estimate
    margin: float
    lower: float
    upper: float
    p_loss: float
