"""Intruder dimensions: strong new directions of a tuned matrix that no direction of the base matrix resembles.

    W_0 = U0 S0 V0^T,  W = W_0 + D = U S V^T
    m_j = max_i |<u_j, u0_i>|  for u_j of the k largest s_j and ALL i;  u_j is an intruder if m_j < eps
    energy = sum of s_j^2 of the intruders / sum of the k largest s_j^2;  gap = min (s_j - s_j+1) / s_j, j <= k

Shuttleworth, Andreas, Torralba, Sharma, NeurIPS 2025 (2410.21228). PEFT ships a reducer of intruders but no count.
Left vectors are on the output side: GPT-2's transposed Conv1D is turned first. "Intruder" means spread over the base's
spectrum, not outside its span; where the spectrum is flat (small gap) any small noise rotates u_j.

Ours: the same count for W_0 plus a Gaussian update of D's Frobenius norm (the control, three draws where there are
intruders); a finding needs more intruders than every draw and a similarity under 0.8 of the lowest of the draws. U
from the eigenvectors of the smaller Gram matrix in fp64, not an SVD; fused experts (3-D) left out. The repair of the
paper is `IntruderReduction`.

Cost: one full eigenproblem of order min(m, n) a matrix and two to four for the top k. Above a budget only the matrices
with the largest ||D||_2 / ||W_0||_F are taken (estimated by a randomised SVD), and the detail says of how many.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import Pair, Place, is_turned, label, pairs, share
from holdfast.methods.merge._spectrum import left_vectors

TOP_K, EPSILON = 10, 0.5  # Sec. 3 and main text
BUDGET = 6e9  # ours: sum of m * n * min(m, n), about 10 s on two cores
AT_LEAST = 4  # matrices, whatever they cost
DRAWS, CLEAR = 3, 0.8  # ours: random updates; how far below their lowest similarity an intruder must lie


@dataclass(frozen=True)
class Spectrum:
    """Top-k directions of one matrix against its base: intruders, their energy, lowest m_j, smallest gap."""

    intruders: int
    energy: float
    nearest: float
    gap: float


@dataclass(frozen=True)
class Count:
    """One matrix beside random updates of the same norm."""

    pair: Pair
    seen: Spectrum
    controls: list[Spectrum]

    @property
    def random(self) -> int:
        """The most intruders that a random update made."""
        return max(c.intruders for c in self.controls)

    @property
    def clear(self) -> bool:
        """More intruders than by chance, and one of them clearly farther from the base."""
        chance = min(c.nearest for c in self.controls)
        return self.seen.intruders > self.random and self.seen.nearest < CLEAR * chance


def spectrum(u0: torch.Tensor, w: torch.Tensor, k: int = TOP_K, eps: float = EPSILON) -> Spectrum:
    """Compare the top k directions of W (m, n) with all of U0 (m, r)."""
    u, s = left_vectors(w, k + 1)
    near = (u[:, :k].T @ u0).abs().amax(1)  # (k,)
    new, power = near < eps, s[:k] ** 2
    gaps = (s[:-1] - s[1:]) / s[:-1]
    gap = float(gaps.min()) if len(gaps) else 1.0
    return Spectrum(int(new.sum()), float(power[new].sum() / power.sum()), float(near.min()), gap)


def control(change: torch.Tensor, seed: int) -> torch.Tensor:
    """A Gaussian update (m, n) of the same Frobenius norm."""
    draw = torch.randn(change.shape, generator=torch.Generator().manual_seed(seed)).to(change.device)
    return draw * (torch.linalg.vector_norm(change) / torch.linalg.vector_norm(draw))


def count(pair: Pair, transposed: bool, seed: int) -> Count:
    """Intruders of one matrix, and of one random update, or of three where there are any."""
    base, change = _exact(pair.base.detach()), _exact(pair.change())
    if transposed:
        base, change = base.T, change.T
    u0, _ = left_vectors(base)
    seen = spectrum(u0, base + change)
    draws = range(DRAWS if seen.intruders else 1)
    return Count(pair, seen, [spectrum(u0, base + control(change, seed + n)) for n in draws])


def _exact(w: torch.Tensor) -> torch.Tensor:
    return (w.cpu() if w.device.type == "mps" else w).float()  # Apple's GPU has no fp64


def candidates(case: Case) -> tuple[list[Pair], int]:
    """(matrices of the layers to look at, most suspicious first; number of changed ones)."""
    ranked = []
    for pair in pairs(case):
        if isinstance(pair.place, int) and pair.base.ndim == 2 and not torch.equal(*_same_device(pair)):
            ranked.append((_strength(pair, case.seed), pair))
    ranked.sort(key=lambda sp: -sp[0])
    taken, spent = [], 0.0
    for _, pair in ranked:
        spent += pair.base.numel() * min(pair.base.shape)
        if len(taken) >= AT_LEAST and spent > BUDGET:
            break
        taken.append(pair)
    return taken, len(ranked)


def _same_device(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    return pair.base, pair.tuned.to(pair.base.device)


def _strength(pair: Pair, seed: int) -> float:
    change = pair.change()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        top = torch.svd_lowrank(change, q=min(4, *change.shape), niter=1)[1][0]
    return float(top / torch.linalg.vector_norm(pair.base.detach().float()).clamp(min=1e-30))


def diagnose(case: Case) -> Finding:
    """Count intruder dimensions in the layers' matrices and in random updates of the same norm."""
    taken, changed = candidates(case)
    if not taken:
        sentence = f"{NOTHING}: no matrix of the layers changed."
        return Finding("intruder dimensions", sentence, scores={"intruders": 0.0, "control": 0.0})
    turned = [is_turned(case.base, p.name) for p in taken]
    counts = [count(p, t, case.seed + DRAWS * n) for n, (p, t) in enumerate(zip(taken, turned, strict=True))]
    found, random = (sum(n) for n in zip(*((c.seen.intruders, c.random) for c in counts), strict=True))
    return Finding(
        "intruder dimensions",
        _sentence(counts, found, random),
        _detail(counts, changed),
        _table(counts),
        {
            "intruders": float(found),
            "control": float(random),
            "clear matrices": float(sum(c.clear for c in counts)),
            "matrices": float(len(counts)),
        },
    )


def _sentence(counts: list[Count], found: int, random: int) -> str:
    clear = [c for c in counts if c.clear]
    if not clear:
        return (
            f"{NOTHING}: {found} intruder dimensions in {len(counts)} matrices, and {random} in random updates of the"
            " same norm, none clearly stranger to the base."
        )
    by_place: Counter[Place] = Counter()
    for c in clear:
        by_place[c.pair.place] += c.seen.intruders
    number, worst = by_place.total(), max(clear, key=lambda c: (c.seen.intruders, c.seen.energy))
    return (
        f"{number} intruder dimension{'s' * (number != 1)} beyond chance in {len(clear)} of {len(counts)} matrices,"
        f" most in {label(by_place.most_common(1)[0][0])}; random updates of the same norm make"
        f" {sum(c.random for c in clear)} there. The strongest case is {worst.pair.name}: {worst.seen.intruders} of"
        f" its top {TOP_K}, with {share(worst.seen.energy)} of their energy."
    )


def _detail(counts: list[Count], changed: int) -> str:
    which = "all" if len(counts) == changed else f"the {len(counts)} with the strongest single direction"
    return (
        f"Looked at {which} of {changed} changed matrices: top {TOP_K} directions, an intruder has similarity under"
        f" {EPSILON} to every direction of the base. They were linked to forgetting; a higher LoRA rank or a lower"
        " learning rate makes fewer. A gap near 0 % means that the directions are close to exchangeable."
    )


def _table(counts: list[Count]) -> list[list[Any]]:
    shown = sorted(counts, key=lambda c: (-c.clear, c.random - c.seen.intruders, -c.seen.energy))[:12]
    head = ["Matrix", "Intruders", "Random update", "Share of energy", "Lowest similarity", "Smallest gap"]
    rows = [
        [c.pair.name, c.seen.intruders, c.random, share(c.seen.energy), f"{c.seen.nearest:.2f}", share(c.seen.gap)]
        for c in shown
    ]
    return [head, *rows]
