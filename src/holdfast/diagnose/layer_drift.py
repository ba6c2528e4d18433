"""Layer drift: where the weights moved, and from which layer on the states of the two models part.

    weights   ||D||_F / ||W_0||_F per layer and module, D = W - W_0; stable rank ||D||_F^2 / ||D||_2^2 of the top one
    states    h0, h1 = output of a layer of base and tuned on the same prompt tokens:
              drift = E||h1 - h0|| / E||h0||, mean row cosine, linear CKA
    output    KL(p_base || p_tuned) in nats a token, agreement of the likeliest token, change of the loss a token

CKA is of Kornblith et al. 2019 (1905.00414); no paper owns the report as a whole. Differences from it: the unbiased
HSIC estimator (Song et al. 2012) in place of the biased one, because there are fewer rows than 4 D; a second value
without the 4 dimensions of largest states, which else decide it alone. Ours: few-shot prompts of 8 held-out tasks, at
most 64 tokens of each as rows, the first token left out (an attention sink of huge norm); and the rule.

The rule: a layer stands out at 3 times the median change of the others, and a change is strong at 10 % of the weights'
norm or at a CKA under 0.9. Cost: one pass over the weights, two forwards of about 500 tokens, two Grams a layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import (
    STANDOUT,
    Pair,
    Place,
    blocks,
    evaluating,
    held_out_prompts,
    label,
    pairs,
    relative,
    share,
    standout,
    state_in,
    state_out,
    times,
    watching,
)

PROMPTS, ROWS = 8, 64  # ours: prompts, and tokens of each
STRONG, FAR = 0.1, 0.9  # ours: share of the weights' norm, CKA
DROPPED = 4  # dimensions of the largest states


@dataclass
class Weights:
    """Sums of squares (change, base) by place, by (place, module), and the most moved matrix."""

    places: dict[Place, list[float]]
    modules: dict[tuple[Place, str], list[float]]
    top: dict[Place, tuple[float, Pair]]


def weigh(case: Case) -> Weights:
    """One pass over the parameters of both models."""
    found = Weights(defaultdict(lambda: [0.0, 0.0]), defaultdict(lambda: [0.0, 0.0]), {})
    for pair in pairs(case):
        squares = pair.squares()
        for sums in (found.places[pair.place], found.modules[pair.place, pair.module]):
            sums[0] += squares[0]
            sums[1] += squares[1]
        if pair.base.ndim == 2 and squares[0] > found.top.get(pair.place, (0.0, pair))[0]:
            found.top[pair.place] = squares[0], pair
    return found


def stable_rank(change: torch.Tensor) -> float:
    """||D||_F^2 / ||D||_2^2 of a matrix (m, n); the spectral norm by a randomised SVD."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        top = torch.svd_lowrank(change, q=min(6, *change.shape), niter=4)[1][0]
    return float(torch.linalg.vector_norm(change) / top) ** 2


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA of two (n, D) sets of rows, n > 3, by the unbiased HSIC estimator; 1 for equal sets."""
    a, b = (_centred(h.float() @ h.float().T) for h in (x - x.mean(0), y - y.mean(0)))
    norms = float((a * a).sum()) * float((b * b).sum())
    return float((a * b).sum()) / math.sqrt(norms) if norms > 0 else float(torch.equal(x, y))


def _centred(gram: torch.Tensor) -> torch.Tensor:
    """U-centring: the inner product of two such matrices is n (n - 3) times the unbiased HSIC."""
    n = len(gram)
    k = gram.double().fill_diagonal_(0)
    rows = k.sum(1) / (n - 2)
    return (k - rows[:, None] - rows[None] + k.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)


def compare_states(h0: torch.Tensor, h1: torch.Tensor) -> dict[str, float]:
    """Drift, cosine and CKA (also without the largest dimensions) of two (n, D) sets of states."""
    norm = torch.linalg.vector_norm
    rest = h0.abs().mean(0).argsort()[: max(1, h0.shape[1] - DROPPED)]
    return {
        "drift": float(norm(h1 - h0, dim=1).mean() / norm(h0, dim=1).mean()),
        "cosine": float(torch.cosine_similarity(h0, h1, dim=1).mean()),
        "cka": cka(h0, h1),
        "cka_rest": cka(h0[:, rest], h1[:, rest]),
    }


def forward(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States (n, D) after the embeddings and after each layer at `rows`, and log-probabilities (T, V); fp32, CPU."""
    states: list[torch.Tensor] = []

    def keep(n: int, args: Any, kwargs: Any, output: Any) -> None:
        for state in [state_in(args, kwargs)] * (n == 0) + [state_out(output)]:
            states.append(state[0][rows.to(state.device)].float().cpu())

    device = next(model.parameters()).device
    with watching(blocks(model)[1], keep):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[0]
    return states, logits.float().log_softmax(-1).cpu()


def drift(case: Case) -> tuple[list[dict[str, float]], dict[str, float]]:
    """(comparison of the states at the embeddings and after each layer, comparison of the outputs)."""
    draw = torch.Generator().manual_seed(case.seed)
    layers: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    sums: dict[str, float] = defaultdict(float)
    for ids in held_out_prompts(case, PROMPTS):
        rows = (1 + torch.randperm(ids.shape[1] - 1, generator=draw)[:ROWS]).sort().values
        (h0, p0), (h1, p1) = forward(case.base, ids, rows), forward(case.tuned, ids, rows)
        for n, both in enumerate(zip(h0, h1, strict=True)):
            layers[n].append(both)
        truth = ids[0, 1:, None]
        sums["tokens"] += len(truth)
        sums["kl"] += float((p0.exp() * (p0 - p1)).sum(-1)[:-1].sum())
        sums["agreement"] += float((p0.argmax(-1) == p1.argmax(-1))[:-1].sum())
        sums["loss change"] += float((p0[:-1].gather(1, truth) - p1[:-1].gather(1, truth)).sum())
    states = [compare_states(*(torch.cat(h) for h in zip(*layers[n], strict=True))) for n in sorted(layers)]
    tokens = sums.pop("tokens")
    return states, {k: v / tokens for k, v in sums.items()}


def diagnose(case: Case) -> Finding:
    """Name the layer whose weights moved most, or from which on the states part."""
    weights = weigh(case)
    total = relative([sum(s) for s in zip(*weights.places.values(), strict=True)])
    if total == 0:
        return Finding("layer drift", f"{NOTHING}: base and tuned have the same weights.", scores={"weights": 0.0})
    with evaluating(case.base, case.tuned):
        states, output = drift(case)
    moved = {p: relative(s) for p, s in weights.places.items()}
    place, ratio = standout(moved)
    far = min(states, key=lambda s: s["cka"])["cka"]
    scores = {"weights": total, "largest": moved[place], "cka": far, "drift": states[-1]["drift"], **output}
    return Finding(
        "layer drift",
        _sentence(weights, moved, states, total),
        _detail(weights, place, states, output),
        _table(weights, moved, states),
        scores | {"times median": ratio} if math.isfinite(ratio) else scores,
    )


def _sentence(weights: Weights, moved: dict[Place, float], states: list[dict[str, float]], total: float) -> str:
    place, ratio = standout(moved)
    most = f"{label(place)} changed by {share(moved[place])} of its weights' norm"
    first = next((n for n, s in enumerate(states) if s["cka"] < FAR), None)
    if ratio >= STANDOUT:
        return f"The change sits in {label(place)}: {most}, {times(ratio)}, above all in {_module(weights, place)}."
    if total >= STRONG:
        return f"The weights moved far in all layers, by {share(total)} of their norm; most of all, {most}."
    if first is not None:
        where = "the embeddings" if first == 0 else f"layer {first - 1}"
        return f"The states part from the base's at {where} (CKA {states[first]['cka']:.2f}), with small even changes."
    return f"{NOTHING}: the weights moved by {share(total)} of their norm, evenly over the layers; at most, {most}."


def _module(weights: Weights, place: Place) -> str:
    inside = {m: s[0] for (p, m), s in weights.modules.items() if p == place}
    return max(inside, key=lambda m: inside[m])


def _detail(weights: Weights, place: Place, states: list[dict[str, float]], output: dict[str, float]) -> str:
    worst = min(range(len(states)), key=lambda n: states[n]["cka"])
    words = [
        f"On prompts of {PROMPTS} held-out tasks the last layer's states drift by {share(states[-1]['drift'])} of"
        f" their norm; CKA is lowest {_after(worst)}, {states[worst]['cka']:.3f}.",
        f"Output: KL {output['kl']:.3g} nats a token, same likeliest token for {share(output['agreement'])},"
        f" loss {output['loss change']:+.3g} nats a token.",
    ]
    if place in weights.top:
        pair = weights.top[place][1]
        words.append(f"The change of {pair.name} has stable rank {stable_rank(pair.change()):.1f}.")
    return " ".join(words)


def _after(n: int) -> str:
    return "after the embeddings" if n == 0 else f"after layer {n - 1}"


def _table(weights: Weights, moved: dict[Place, float], states: list[dict[str, float]]) -> list[list[Any]]:
    order = sorted(moved, key=lambda p: (p == "norm and head", p if isinstance(p, int) else -1))
    rows: list[list[Any]] = [["Place", "Weights", "Most in", "States", "Cosine", "CKA", f"CKA less {DROPPED} dims"]]
    for place in order:
        n = place + 1 if isinstance(place, int) else 0 if place == "embeddings" else None
        seen = [] if n is None else [states[n]]
        row: list[Any] = [label(place), share(moved[place]), _module(weights, place) if moved[place] else ""]
        row += [share(seen[0]["drift"])] if seen else [""]
        rows.append(row + [f"{seen[0][k]:.3f}" if seen else "" for k in ("cosine", "cka", "cka_rest")])
    return rows
