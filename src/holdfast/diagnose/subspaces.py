"""Safety subspaces: does the change of tuning lie where aligning the base had changed it? Three models are compared.

    V = W_base - W_ancestor (alignment),  U = W_tuned - W_base, of each matrix (m out, n in) of the layers
    Q_v   the first k left singular vectors of V, k = round(frac * min(m, n))
    kept  = |Q_v Q_v^T U|_F^2 / |U|_F^2, the energy of U inside the alignment's main directions;  by chance k / m
    MSO   = |Q_u^T Q_v|_F^2 / min(k_u, k_v), Q of the fewest directions with a share e of the energy;
            by chance max(k_u, k_v) / m

Ponkshe et al. 2025 (2505.14185, the id from memory; its repository was read) find that utility and harm fall
together under every such projection: no subspace holds safety alone. So overlap is a lead and not a proof, and a small
one is no safety. Their experiments with projected models need harm and utility measured: `projected` makes such a
model, for who wants to measure it.

Here the ancestor is what the base was tuned from, such as the pretrained model below an instruct model. The rule is
ours: the change lies in the alignment's directions when `kept` at frac 0.1, over all matrices, is TIMES of chance.
Cost: two SVDs of every matrix that changed twice; three models in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import Pair, is_turned, label, pairs, share
from holdfast.errors import ModelError

FRAC, ENERGY = 0.1, 0.5  # ours, out of the paper's grids
TIMES = 3.0  # ours


@dataclass(frozen=True)
class Overlap:
    """One matrix: energy of the change, of it inside the alignment's directions and by chance; MSO and by chance."""

    pair: Pair
    energy: float
    inside: float
    chance: float
    mso: float
    mso_chance: float

    @property
    def times(self) -> float:
        return self.inside / self.chance


def left(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(left singular vectors (m, r), singular values (r,)) of a matrix, in fp64."""
    u, s, _ = torch.linalg.svd(w.double(), full_matrices=False)
    return u, s


def parallel(change: torch.Tensor, alignment: torch.Tensor, frac: float) -> torch.Tensor:
    """The part of a change (m, n) in the alignment's first `frac` of left directions."""
    if not alignment.any():
        return torch.zeros_like(change)  # no direction of it is more its own than another
    q = left(alignment)[0][:, : max(1, round(frac * min(alignment.shape)))]
    return (q @ (q.T @ change.double())).to(change.dtype)


def main(u: torch.Tensor, s: torch.Tensor, energy: float) -> torch.Tensor:
    """The fewest directions (m, k) with a share `energy` of the sum of squares."""
    held = (s**2).cumsum(0) / (s**2).sum()
    return u[:, : int((held < energy - 1e-12).sum()) + 1]


def mso(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(overlap of two orthonormal sets (m, k_a) and (m, k_b) in [0, 1], that of random sets)."""
    found = float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1])
    return found, max(a.shape[1], b.shape[1]) / len(a)


def overlap(pair: Pair, alignment: torch.Tensor, turned: bool = False) -> Overlap:
    """Compare the change of one matrix with what alignment had changed of it; turned: both are (in, out)."""
    change = pair.change().double()
    if turned:
        change, alignment = change.T, alignment.T
    (u, s), (v, t) = left(change), left(alignment)
    k = max(1, round(FRAC * min(change.shape)))
    energy = float(change.square().sum())
    inside = float((v[:, :k].T @ change).square().sum())
    found = mso(main(u, s, ENERGY), main(v, t, ENERGY))
    return Overlap(pair, energy, inside / energy, k / len(change), *found)


def diagnose(case: Case) -> Finding:
    """The change of tuning against that from the ancestor to the base."""
    if case.ancestor is None:
        what = "It compares three models, and the one that the base was tuned from was not named."
        raise ModelError(what, "Name it: check --ancestor MODEL.")
    older = dict(case.ancestor.named_parameters(remove_duplicate=False))
    found = []
    for pair in pairs(case):
        if isinstance(pair.place, int) and pair.base.ndim == 2:
            alignment = _alignment(pair, older)
            if alignment.any() and pair.change().any():
                found.append(overlap(pair, alignment, is_turned(case.base, pair.name)))
    if not found:
        sentence = f"{NOTHING}: no matrix of the layers was changed by both, alignment and tuning."
        return Finding("safety subspaces", sentence, scores={"inside": 0.0, "times": 0.0})
    return _told(found)


def _alignment(pair: Pair, older: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What alignment changed of a matrix of the base, in fp32.

    Raises:
        ModelError: the ancestor has no such matrix.
    """
    old = older.get(pair.name)
    if old is None or old.shape != pair.base.shape:
        shapes = f"{'none' if old is None else tuple(old.shape)} and {tuple(pair.base.shape)}"
        what = f"Ancestor and base differ in the parameter {pair.name!r}: {shapes}."
        raise ModelError(what, "Name the model that the base was tuned from.")
    return pair.base.detach().float() - old.detach().to(pair.base.device).float()


def _told(found: list[Overlap]) -> Finding:
    total = sum(o.energy for o in found)
    inside, chance = (sum(o.energy * getattr(o, x) for o in found) / total for x in ("inside", "chance"))
    both = [sum(getattr(o, x) for o in found) / len(found) for x in ("mso", "mso_chance")]
    worst = max(found, key=lambda o: o.times)
    amount = f"{share(inside)} of the change's energy lies in the first {share(FRAC)} of the alignment's directions"
    if inside >= TIMES * chance:
        sentence = (
            f"Tuning moved the weights where alignment had: {amount}, {inside / chance:.1f} times chance; most in"
            f" {worst.pair.name}. Measure safety and utility both: no subspace holds safety alone."
        )
    else:
        sentence = f"{NOTHING}: {amount}, {inside / chance:.1f} times chance. That alone is no proof of safety."
    rows = [
        [o.pair.name, label(o.pair.place), share(o.inside), share(o.chance), f"{o.mso:.2f}", f"{o.mso_chance:.2f}"]
        for o in sorted(found, key=lambda o: -o.times)[:12]
    ]
    return Finding(
        "safety subspaces",
        sentence,
        f"{len(found)} matrices that both changed. The directions with half of the energy overlap by {both[0]:.2f} on"
        f" average (MSO, from 0 to 1), random ones by {both[1]:.2f}.",
        [["Matrix", "Place", "Inside", "By chance", "MSO", "By chance"], *rows],
        {"inside": inside, "times": inside / chance, "mso": both[0]},
    )


def projected(case: Case, frac: float, into: Any) -> None:
    """Give `into`, a copy of the tuned model, the base's matrices and the part of their change inside the alignment's
    first `frac` of directions (the paper's `same`); all else stays as tuned.

    Raises:
        ModelError: no ancestor, or other parameters.
    """
    if case.ancestor is None:
        raise ModelError("The model that the base was tuned from was not named.", "Give Case.ancestor.")
    older = dict(case.ancestor.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for pair in pairs(case):
            if pair.base.ndim == 2:
                sides = pair.change(), _alignment(pair, older)
                turned = isinstance(pair.place, int) and is_turned(case.base, pair.name)
                part = parallel(sides[0].T, sides[1].T, frac).T if turned else parallel(*sides, frac)
                into.get_parameter(pair.name).copy_(pair.base.float() + part)
