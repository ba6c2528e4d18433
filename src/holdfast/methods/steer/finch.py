"""FINCH: smaller steps where the loss is high, larger ones where it is low.

    lr_t <- lr_t * min(most, (L_ref / L_t) ** power),   power = 1/2
    L_t = loss of the task at this step;   L_ref = mean of L over the first `first` steps

Forgetting of one step is bounded by the learning rate times the square root of the loss at that step (the paper's
abstract), so this factor holds the bound level over the run: hard batches move the weights less, and as the task is
learnt the steps grow. The objective stays as it is: hard tokens still count.
Not verified: only the abstract and summaries of the paper could be read. The bound and its direction are theirs; the
reference L_ref, `first` and the cap `most` are ours.
Cost: none. Combine with: everything; factors of other methods multiply.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class FINCH(Method):
    """Loss-adaptive learning rates (Prashant et al. 2026), arXiv 2605.20005."""

    power: float = 0.5  # the paper's bound: learning rate times the square root of the loss
    most: float = 2.0  # ours: the largest factor
    first: int = 5  # ours: steps whose mean loss is the reference

    paper: ClassVar = Paper("Fine-Tuning Without Forgetting via Loss-Adaptive Learning Rates", "2605.20005",
                            "read in abstract only; reference and cap are ours")  # fmt: skip
    does: ClassVar = "takes smaller steps where the loss is high"
    strengths: ClassVar = ("power",)

    def off(self) -> bool:
        return self.power == 0

    def check(self, ctx: Context) -> None:
        if self.power < 0 or self.most <= 0 or self.first < 1:
            what = "FINCH needs power of at least 0, most above 0, and first of at least 1."
            raise PlanError(what, "Mend them.")

    def prepare(self, ctx: Context) -> State:
        return {"sum": torch.zeros((), dtype=torch.float64), "count": torch.zeros((), dtype=torch.int64)}

    def steer(self, past: Past, state: State) -> Steer | None:
        loss = past.loss["task"]
        if not loss > 0:
            return None
        seen = {}
        total, count = float(state["sum"]), int(state["count"])
        if count < self.first:
            total, count = total + loss, count + 1
            seen = {"sum": torch.tensor(total, dtype=torch.float64), "count": torch.tensor(count)}
        return Steer(lr_factor=min(self.most, (total / count / loss) ** self.power), state=seen)
