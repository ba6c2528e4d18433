"""AnchoredDecay: after every step of the optimizer walk a little of the way back to the base.

    theta <- theta - rate * alpha * (theta - theta0)          rate: the learning rate of the step
    LoRA:  B <- B - rate * alpha * B,   which scales the change s B A exactly

L2ToInit puts the same pull into the loss, where Adam rescales it like every other gradient: weights that hardly get
any are pulled as hard as others. Here the pull is what it says, as AdamW's weight decay is, but towards the base
instead of zero. Where each step of Adam is about `rate` long, weights end within about 1 / alpha such steps of the
base, however long the run. Clipping does not touch it.
Differences: arXiv 2203.17269 has the pull in the loss alone; this form is AdamW's idea applied to it. `rate` is the
schedule's of the first group of parameters: slower layers of a plan (Freeze) are pulled as hard as the others.
Cost: a copy of the trained weights, in checkpoints too; LoRA: nothing. Leave weight_decay at 0.
Combine with: everything at parameter level; instead of L2ToInit.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer, canonical
from holdfast.services import Context

LORA = re.compile(r"\.lora_(embedding_)?([AB])\b")


@dataclass(frozen=True, kw_only=True)
class AnchoredDecay(Method):
    """Decoupled L2 to the starting weights; in the loss: arXiv 2203.17269 (L2-SP is arXiv 1802.01483)."""

    alpha: float = 100.0  # ours: within some 100 steps' length of the base
    patterns: tuple[str, ...] = ()  # only names matching one of these; () is all that trains

    paper: ClassVar = Paper("A Closer Look at Rehearsal-Free Continual Learning", "2203.17269",
                            "the decoupled form is ours")  # fmt: skip
    does: ClassVar = "walks a little of the way back to the base after every step"
    strengths: ClassVar = ("alpha",)

    def off(self) -> bool:
        return self.alpha == 0

    def check(self, ctx: Context) -> None:
        if self.alpha < 0:
            raise PlanError(f"AnchoredDecay.alpha is {self.alpha}: a negative pull pushes away.", "Use 0 or more.")

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        """Keeps the base's value of what trains, once: a later stage finds weights that have moved."""
        for n, p in model.named_parameters():
            name = canonical(n)
            if p.requires_grad and not LORA.search(name) and self.touches(name, p):
                state.setdefault(f"base/{name}", p.detach().clone())
        return model

    def steer(self, past: Past, state: State) -> Steer | None:
        return Steer(state={"rate": torch.tensor(past.learning_rate, dtype=torch.float64)})

    def touches(self, name: str, param: torch.Tensor) -> bool:
        lora = LORA.search(name)
        if lora and lora[2] == "A":
            return False
        return not self.patterns or any(re.search(x, name) for x in self.patterns)

    def update(self, name: str, step: torch.Tensor, param: torch.Tensor, state: State) -> torch.Tensor:
        if LORA.search(name):
            base = torch.zeros_like(param)
        elif f"base/{name}" in state:
            base = state[f"base/{name}"].to(param.device, param.dtype)
        else:
            return step
        pull = min(1.0, float(state["rate"]) * self.alpha)
        return step - pull * (param + step - base)
