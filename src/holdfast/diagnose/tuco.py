"""TuCo: how much of an answer comes from tuning, layer by layer.

    f_PT, f_FT   what a layer of base and tuned adds to the state x_l (output - input), both at the TUNED run's x_l
    PTC_l = f_PT(x_l),  FTC_l = f_FT(x_l) - f_PT(x_l),  x_{l+1} = x_l + PTC_l + FTC_l
    P = sum of PTC_l,  F = sum of FTC_l, each at the last token;  TuCo = ||F||_2 / (||P||_2 + ||F||_2), in [0, 1)

Nuti, Franzmeyer, Henriques, ICML 2025 (2506.23423), Algorithm 1. x_0 is the tuned embedding; embeddings, final norm
and head are outside the measure. The base layer attends to the tuned states of all positions, without any cache.

Ours: a hook on the tuned layer calls the base layer with the same arguments (position embeddings of the tuned run
included), which suits every residual architecture; the same ratio for single layers; prompts are few-shot questions of
held-out tasks, where the paper compares chat prompts, web text and attacks. The rule is ours too: the paper gives no
threshold. A layer stands out at 3 times the median of the others and 2 %; TuCo of 10 % or more is strong.

Cost: the tuned forward plus the base's layers, 8 prompts of about 60 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import (
    STANDOUT,
    Place,
    blocks,
    evaluating,
    held_out_prompts,
    label,
    share,
    standout,
    state_in,
    state_out,
    times,
    watching,
)
from holdfast.measure import stats

PROMPTS = 8  # ours
STRONG, SMALL = 0.1, 0.02  # ours: TuCo of the whole model, ratio of one layer


@dataclass(frozen=True)
class Contributions:
    """PTC and FTC (L, D) of each layer at the last token, fp32."""

    base: torch.Tensor
    tuning: torch.Tensor

    @property
    def tuco(self) -> float:
        return float(ratio(self.base.sum(0), self.tuning.sum(0)))

    @property
    def by_layer(self) -> torch.Tensor:
        """(L,) the same ratio of single layers."""
        return ratio(self.base, self.tuning)


def ratio(base: torch.Tensor, tuning: torch.Tensor) -> torch.Tensor:
    """||tuning|| / (||base|| + ||tuning||) over the last axis, 0 where both are 0."""
    p, f = torch.linalg.vector_norm(base, dim=-1), torch.linalg.vector_norm(tuning, dim=-1)
    return f / (p + f).clamp(min=torch.finfo(f.dtype).tiny)


def contributions(base: Any, tuned: Any, ids: torch.Tensor) -> Contributions:
    """Split one run of `tuned` on a prompt (1, T) into what base layers and what tuning added."""
    before, (_, layers) = blocks(base)[1], blocks(tuned)
    ptc: list[torch.Tensor] = []
    ftc: list[torch.Tensor] = []

    def split(n: int, args: Any, kwargs: Any, output: Any) -> None:
        x = state_in(args, kwargs)
        # forward() and not the call: base may be the very model that is being watched
        pre, post = state_out(before[n].forward(*args, **kwargs))[0, -1].float(), state_out(output)[0, -1].float()
        ptc.append(pre - x[0, -1].float())
        ftc.append(post - pre)

    with watching(layers, split):
        tuned(input_ids=ids.to(next(tuned.parameters()).device), use_cache=False)
    return Contributions(torch.stack(ptc), torch.stack(ftc))


def diagnose(case: Case) -> Finding:
    """TuCo on held-out prompts, and the layer where tuning adds the largest share."""
    with evaluating(case.base, case.tuned):
        runs = [contributions(case.base, case.tuned, ids) for ids in held_out_prompts(case, PROMPTS)]
    if not any(r.tuning.any() for r in runs):
        sentence = f"{NOTHING}: tuning adds nothing on {len(runs)} held-out prompts, TuCo is exactly 0."
        return Finding("tuco", sentence, scores={"tuco": 0.0, "largest": 0.0})
    whole = stats.share([r.tuco for r in runs])
    layers: dict[Place, float] = dict(enumerate(torch.stack([r.by_layer for r in runs]).mean(0).tolist()))
    sizes = torch.stack([torch.linalg.vector_norm(r.tuning, dim=-1) for r in runs]).mean(0)
    rows = [[label(n), share(x), f"{s:.3g}"] for (n, x), s in zip(layers.items(), sizes.tolist(), strict=True)]
    return Finding(
        "tuco",
        _sentence(whole.value, layers),
        f"Tuning contributes {share(whole.value)} (95 % interval {share(whole.low)} to {share(whole.high)} over"
        f" {len(runs)} prompts of held-out tasks) of what the layers add at the last token of the prompt.",
        [["Layer", "Share of tuning", "Size of tuning's part"], *rows],
        {"tuco": whole.value, "largest": max(layers.values())},
    )


def _sentence(whole: float, layers: dict[Place, float]) -> str:
    place, ratio = standout(layers)
    most = f"{share(layers[place])} of what {label(place)} adds comes from tuning"
    if ratio >= STANDOUT and layers[place] >= SMALL:
        return f"Tuning acts above all in {label(place)} on prompts it should not touch: {most}, {times(ratio)}."
    if whole >= STRONG:
        return (
            f"Tuning acts strongly on prompts it should not touch: TuCo {share(whole)}, most in {label(place)}, "
            f"where {share(layers[place])} comes from tuning."
        )
    return f"{NOTHING}: tuning adds little on held-out prompts, TuCo {share(whole)}; at most, {most}."
