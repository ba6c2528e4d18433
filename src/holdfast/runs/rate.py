"""`training.learning_rate: auto`: the rate that a run begins to be right with, from what trains and the model's width.

    an adapter:               1.5e-3 min(1, 576 / D)
    the model's own weights:  a tenth of that, at most 2e-5

D, the width: 576 in SmolLM2-135M, where 1.5e-3 was measured for the default plan (the leaderboard). It falls as 1 / D
since a step of Adam moves what a matrix puts out in proportion to its width (Tensor Programs V, arXiv 2203.03466).
That gives 4.2e-4 at 2048 (1B), 2.1e-4 at 4096 (8B) and 1.1e-4 at 8192 (70B), near the 2e-4 and 1e-4 that QLoRA took
(arXiv 2305.14314; from memory). "LoRA Without Regret" (Thinking Machines, 2025) found a slower fall, with the power
0.78 for Llama and 0.08 for Qwen, and higher rates for wide models: of the sources this is the careful one, for what is
too fast costs abilities, and what is too slow only time. The tenth is theirs too. The bound of 2e-5 is ours: on 135M
the task is learnt better at 5e-5 and 1e-4, and unprotected abilities are lost sooner (docs/leaderboard.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.plan import Plan

MEASURED, WIDTH = 1.5e-3, 576  # ours: the default plan on SmolLM2-135M
FULL_SHARE, FULL_MOST = 0.1, 2e-5  # LoRA Without Regret; ours
STEPS, ROWS = 24, 64  # of a trial of `search`; validation rows that judge it: ours


@dataclass(frozen=True)
class Rate:
    """A peak learning rate, and why it is that. tried: what short trials found, [rate, loss or None] each."""

    value: float
    why: str
    tried: tuple[tuple[float, float | None], ...] = ()

    def said(self) -> dict[str, Any]:
        """As plain data, for files."""
        return {"value": self.value, "why": self.why, "tried": [list(t) for t in self.tried]}


def auto(plan: Plan, model: Any) -> Rate:
    """The rate for what `plan` trains on `model`, to two digits."""
    width = width_of(model)
    adapter = MEASURED * min(1.0, WIDTH / width)
    if plan.trains_new:
        return Rate(rounded(adapter), f"auto: new weights beside a frozen base of width {width}")
    value = min(FULL_MOST, FULL_SHARE * adapter)
    return Rate(rounded(value), f"auto: the weights of a base of width {width} train themselves")


def width_of(model: Any) -> int:
    """D, the width of the states of a model."""
    config = model.config.get_text_config()
    return int(getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[-1])


def rounded(value: float) -> float:
    """To two digits, as people write rates."""
    return float(f"{value:.1e}")
