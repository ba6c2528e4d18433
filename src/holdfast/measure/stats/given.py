"""The scores, clusters, levels and chances that were given, checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from holdfast.errors import HoldfastError

Task = tuple[ArrayLike, ArrayLike, "ArrayLike | None"]  # base scores (N,), tuned scores (N,), clusters (N,) or None


def numbers_of(x: ArrayLike, name: str) -> np.ndarray:
    out = np.asarray(x, dtype=float)
    if out.ndim != 1 or out.size == 0:
        raise HoldfastError(
            f"{name} has shape {out.shape}, not a list of at least one number.", "Give one score per item."
        )
    if not np.isfinite(out).all():
        at = int(np.flatnonzero(~np.isfinite(out))[0])
        raise HoldfastError(f"{name} has the value {out[at]} at item {at}.", "Remove the item or mend its score.")
    return out


def pair_of(base: ArrayLike, tuned: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    b, t = numbers_of(base, "base"), numbers_of(tuned, "tuned")
    if b.size != t.size:
        raise HoldfastError(
            f"base has {b.size} scores and tuned has {t.size}.",
            "Score both models on the same items, in one order.",
        )
    return b, t


def groups_of(clusters: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
    """Return the cluster number of each item (N,) and G."""
    if clusters is None:
        return np.arange(n), n
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if index.size != n:
        raise HoldfastError(f"There are {index.size} cluster names for {n} scores.", "Give one cluster per item.")
    return index.reshape(-1), names.size


def is_binary(*arrays: np.ndarray) -> bool:
    return all(bool(np.isin(a, (0.0, 1.0)).all()) for a in arrays)


def alpha_of(level: float) -> float:
    if not 0 < level < 1:
        raise HoldfastError(f"The level is {level}.", "Give a level between 0 and 1, such as 0.95.")
    return 1 - level


def chance_of(chance: Mapping[str, float] | float, name: str) -> float:
    if isinstance(chance, Mapping) and name not in chance:
        raise HoldfastError(f"Task {name!r} has no chance level.", f"Add {name!r} to the chance levels (0 if open).")
    c = float(chance[name] if isinstance(chance, Mapping) else chance)
    if not 0 <= c < 1:
        raise HoldfastError(f"The chance level of {name!r} is {c}.", "Give 1/choices or the majority rate, below 1.")
    return c
