"""How large a loss a number of items can show."""

from __future__ import annotations

import math

from scipy.special import ndtr, ndtri

from holdfast.errors import HoldfastError
from holdfast.measure.stats.given import alpha_of
from holdfast.measure.stats.verdict import crossing


def power(n: float, discordant: float, delta: float, level: float = 0.95) -> float:
    """Return the chance that n paired 0/1 items show a true loss of `delta` (a fraction, 0.03 = 3 points).

    discordant: fraction of items whose mark changes (0.1 to 0.2 is usual; at least delta). Normal
    approximation, var(d) = discordant - delta^2, two-sided level: a little careful for the one-sided verdict.
    """
    if n < 1 or not 0 <= discordant <= 1 or not 0 <= delta <= 1:
        raise HoldfastError(
            f"Power was asked for n={n}, discordant={discordant}, delta={delta}.",
            "Give n >= 1 and fractions between 0 and 1.",
        )
    se = math.sqrt((max(discordant, delta) - delta**2) / n)
    z = float(ndtri(1 - alpha_of(level) / 2))
    return float(ndtr(delta / se - z)) if se > 0 else float(delta > 0)


def detectable(n: float, discordant: float, power: float = 0.9, level: float = 0.95) -> float:
    """Return the smallest true loss (a fraction) that n paired 0/1 items show with this power."""
    if not 0.5 <= power < 1:
        raise HoldfastError(f"The power is {power}.", "Give a power from 0.5 to below 1, such as 0.9.")
    return crossing(lambda delta: power - _power(n, discordant, delta, level), 0.0, 1.0)


_power = power  # detectable has a parameter of the same name
