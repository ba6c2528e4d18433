"""MovingAverage: the run's result is a moving average of its weights, the slow memory of I-LoRA.

    after step t (from 0):   s <- a s + (1 - a) w,   a = min(1 - 1/(t + 1), decay)
    w   what trains, an adapter's factors or the model's own weights;   in the end w <- s

The first step copies w into s. The training itself is not touched. The paper's text infers with the slow learner, as
here; its code saves the fast one. `decay` 0.25 is its code's: s moves three quarters of the way at every step, so it
is the last few steps; 0.99 or more is the usual average along training.
Not built, so this is I-LoRA's average and not I-LoRA: from the second task on the paper adds, on rows of a buffer of
earlier tasks, their loss (`Replay` does that) and the pull of the fast adapter to the slow one's states,

    gamma mean over all layers of (h_w - max(h_w, h_s))^2,   h_s the states with s in the place of w, no gradient

so only entries in which the slow state is the larger one are pulled. That needs a second forward with s swapped in at
every step, for its states. No site offers it: a loss sees the states of its own forward and of the base, and averaged
teachers (`SDFT`) hand out log-probabilities alone.
On an adapter the factors are averaged, not their product, as in the paper.
Cost: one copy of what trains, in checkpoints too. Looks during training see w. Combine with: everything but LTSFT.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer
from holdfast.methods.update._average import average_of, keyed, moved, step_to
from holdfast.services import Context

STEPS = "steps"


@dataclass(frozen=True, kw_only=True)
class MovingAverage(Method):
    """The interpolation of I-LoRA (Ren et al. 2024), arXiv 2402.18865."""

    decay: float = 0.25  # of the released code; the share of the old average

    paper: ClassVar = Paper("Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning",
                            "2402.18865", "the average alone; the title is from memory")  # fmt: skip
    does: ClassVar = "ends with a moving average of the weights along training"
    refuses: ClassVar = {"LTSFT": "its second stage begins again at the base, and the average remembers the first one"}

    def off(self) -> bool:
        return self.decay == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.decay < 1:
            raise PlanError(f"MovingAverage.decay is {self.decay}.", "Use 0 or more, below 1.")

    def rate(self, state: State) -> float:
        """How far the average moves for the latest step."""
        latest = int(state[STEPS]) - 1  # t
        return 1 - min(1 - 1 / (latest + 1), self.decay)

    def steer(self, past: Past, state: State) -> Steer | None:
        """Before a step: take in what the step before it made."""
        if STEPS not in state:  # no step was taken yet
            return Steer(state={STEPS: torch.tensor(1)})
        rate = self.rate(state)
        found = {name: step_to(average_of(name, p, state), p, rate) for name, p in past.params.items()}
        return Steer(state={**keyed(found), STEPS: state[STEPS] + 1})

    def settled(self, name: str, param: torch.Tensor, state: State) -> torch.Tensor:
        return moved(average_of(name, param, state), param, self.rate(state)) if STEPS in state else param
