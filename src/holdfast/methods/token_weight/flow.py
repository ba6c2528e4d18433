"""FLOW: rows that the base finds easy weigh more, so that the task moves the model less.

    loss = mean over tokens of w_i * (-log p(y_t)),   w_i = exp(-f_i / tau),   t in row i

f_i: the base's mean loss per token of row i, measured once before training; tau: the median of all f_i, so that half
of the rows weigh more than 1 / e. A row the base cannot make sense of counts for nearly nothing: its gradient is the
large one, and away from what the base knows. by = "token": f and tau of single tokens instead.
Weights are not divided by their sum, as in the released code: the task's loss is smaller than without, which AdamW
evens out, while terms of other methods weigh more against it. Rows that other methods mix in have weight 1. Methods
that change targets (S3FT) stand before it in the plan.
Pitfall: what the base finds hard is also what is new in the task. Where the rows teach new facts or a new format this
teaches them last. Cost: one forward of the base over the task's rows.
Combine with: every adapt and loss method. With DFT, which weights tokens likewise, rows weigh by both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from holdfast.data.mix import Mix
from holdfast.engine.base import token_logp
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context, View

NUMBER = "FLOW"  # under which the weights stand in the rows


@dataclass(frozen=True, kw_only=True)
class FLOW(Method):
    """Fine-tuning with pre-trained loss-oriented weighting (Sanyal et al., ICML 2025), arXiv 2502.02797."""

    temperature: float | None = None  # the paper: None is the median of the base's losses
    by: str = "row"  # the paper's samples; the released code has both

    paper: ClassVar = Paper("Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting", "2502.02797",
                            "read in the abstract, summaries and a copy of the released code")  # fmt: skip
    does: ClassVar = "weights the rows of the task by how easy the base finds them"
    writes: ClassVar = frozenset({NUMBER})

    def check(self, ctx: Context) -> None:
        if self.temperature is not None and self.temperature <= 0:
            raise PlanError(f"FLOW.temperature is {self.temperature}.", "Use a number above 0, or none: the median.")
        if self.by not in ("row", "token"):
            raise PlanError(f"FLOW.by is {self.by!r}.", "Use 'row' or 'token'.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        rows = list({r.key: r for r in map(mix.mapped, mix.kept)}.values())
        weights = self.weights(rows, [-logp for logp in token_logp(ctx.model, rows)])

        def weighted(row: TokenRow) -> TokenRow:
            if not row.of_task or row.key not in weights:
                return row
            return replace(row, numbers={**row.numbers, NUMBER: weights[row.key]})

        return mix.map(weighted)

    def weights(self, rows: Sequence[TokenRow], losses: Sequence[np.ndarray]) -> Mapping[bytes, np.ndarray]:
        """(T,) weights of each row by its key, from the base's losses (n,) at its targets."""
        by_token = self.by == "token"
        each = [loss if by_token else np.full(len(loss), loss.mean()) for loss in losses]
        one = np.concatenate(each) if by_token else np.asarray([x[0] for x in each if len(x)])
        tau = float(np.median(one)) if self.temperature is None else self.temperature
        if not tau > 0:
            what = "FLOW weights rows by the base's losses on them, but the median of these is 0: it knows them all."
            raise PlanError(what, "Set FLOW.temperature, or take FLOW out of the plan.")
        return {row.key: _along(row, np.exp(-loss / tau)) for row, loss in zip(rows, each, strict=True)}

    def token_weight(self, view: View) -> torch.Tensor:
        return view.number(NUMBER)


def _along(row: TokenRow, values: np.ndarray) -> np.ndarray:
    """(T,) values at the row's targets, 1 elsewhere."""
    out = np.ones(len(row.ids), dtype=np.float32)
    out[row.scored] = values
    return out
