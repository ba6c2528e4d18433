"""AdaptiveEMA: the run's result is a moving average of its weights whose rate follows the gradients.

    after each step, per tensor:   e <- (1 - beta) e + beta p
    beta = 2 (1 + b) / (a c),   a = |p - e|,  b = |g|,  c = |g - g_prev|   (L1 norms; g the step's gradient)
    beta = fallback where that is not in (0, 1), or there is no g_prev
    e begins as p before the first step; in the end p <- e

The formula is of the released code; the paper derives it from the new task's loss plus the distance to the old
optimum, with the gradient's change in place of the second derivative. L1 norms grow with the tensor, so large tensors
get a tiny beta and small ones often the fallback; `norm: mean` (ours) divides all three by the number of entries.
Differences: the gradient is read before clipping and masks, the code reads it behind them; one task a run, so the
first task needs no off-switch of its own (in the code that switch does not work). Not built: new adapters for new
tasks.
Cost: two copies of what trains, in checkpoints too, and whole gradients. Looks during training see p.
Combine with: everything but LTSFT.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer
from holdfast.methods.update._average import Move, average_of, keyed, moved, step_to
from holdfast.services import Context

GRADIENT, NORMS, SCALES = "gradient/", "norms/", ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class AdaptiveEMA(Method):
    """Large Continual Instruction Assistant (Qiao et al., ICML 2025), arXiv 2410.10868, its average of weights."""

    norm: str = "sum"  # the released code; or "mean", which is ours
    fallback: float = 0.01  # the released code

    paper: ClassVar = Paper("Large Continual Instruction Assistant", "2410.10868",
                            "from the released code; the paper's numbers were not verified")  # fmt: skip
    does: ClassVar = "ends with an average of the weights whose rate follows the gradients"
    needs: ClassVar = frozenset({"gradients"})
    refuses: ClassVar = {
        "LTSFT": "its second stage begins again at the base, and the average remembers the first one",
        "MovingAverage": "both say which average of the weights is the run's result",
    }

    def check(self, ctx: Context) -> None:
        if self.norm not in SCALES:
            raise PlanError(f"AdaptiveEMA.norm is {self.norm!r}.", "Use sum or mean.")
        if not 0 < self.fallback <= 1:
            raise PlanError(f"AdaptiveEMA.fallback is {self.fallback}.", "Use a rate above 0, at most 1.")

    def size(self, x: torch.Tensor) -> float:
        """The L1 norm of a tensor, or its mean over entries."""
        return float(x.abs().sum() if self.norm == "sum" else x.abs().mean())

    def rate(self, name: str, average: torch.Tensor, param: torch.Tensor, state: State) -> float:
        """beta of one tensor, for the latest step."""
        if NORMS + name not in state:
            return self.fallback
        b, c = state[NORMS + name].tolist()
        product = self.size(param.detach().float() - average) * c
        beta = 2 * (1 + b) / product if product else 0.0
        return beta if 0 < beta < 1 else self.fallback

    def after(self, name: str, param: torch.Tensor, state: State, move: Move) -> torch.Tensor:
        """The average once it has taken in the latest step."""
        average = average_of(name, param, state)
        return move(average, param, 1.0 if average is None else self.rate(name, average, param, state))

    def steer(self, past: Past, state: State) -> Steer | None:
        """Before a step: take in what the step before it made, and remember this step's gradient."""
        found = keyed({name: self.after(name, p, state, step_to) for name, p in past.params.items()})
        for name in past.params:
            found |= self._noted(name, past.grads[name].float() if name in past.grads else None, state)
        return Steer(state=found)

    def _noted(self, name: str, grad: torch.Tensor | None, state: State) -> State:
        """What the rate of this step will need; nan where there was no gradient now or before."""
        before = state.get(GRADIENT + name)
        if grad is None:
            return {NORMS + name: torch.full((2,), torch.nan, dtype=torch.float64)}
        change = torch.nan if before is None else self.size(grad - before.to(grad.device))
        norms = torch.tensor([self.size(grad), change], dtype=torch.float64)
        return {NORMS + name: norms, GRADIENT + name: grad.clone()}

    def settled(self, name: str, param: torch.Tensor, state: State) -> torch.Tensor:
        return self.after(name, param, state, moved)
