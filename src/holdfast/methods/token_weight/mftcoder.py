"""MFTCoder: every source of the mix counts as much as its weight says, however many rows or tokens it has.

    loss = sum_k w_k * L_k / sum_k w_k,   k: the sources that stand in the step
    inside "tokens":   L_k = mean over the tokens of source k
    inside "samples":  L_k = mean over the rows of source k of the mean over a row's tokens

across: false leaves the sources alone: one mean over all tokens ("tokens", which is plain fine-tuning) or one over the
rows of each row's mean ("samples", where a long answer counts as much as a short one). Tokens are scored positions.
The sources are "task" ("task:NAME" for each of several training sets) and those that other methods mix in, named as
in the report ("Replay:instructions"), so with `weights` replayed text keeps a fixed part of the loss whatever its
length. It stands behind these methods in the plan.
Differences: the means are over the whole optimizer step, there over a process's micro-batch. Its weights that move
with the slopes of held-out losses (CoBa) are not here.
Cost: none. Combine with: Replay, InContextMix; every adapt and loss method. Weights of tokens multiply with it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from holdfast.data.mix import Mix, names_of
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class MFTCoder(Method):
    """Multi-task losses of MFTCoder (Liu et al., KDD 2024), arXiv 2311.02303."""

    inside: str = "tokens"  # the mode that the released code recommends
    across: bool = True  # the same
    weights: tuple[tuple[str, float], ...] = ()  # [source, weight]; 1 for the others, as in the released code

    paper: ClassVar = Paper("MFTCoder: Boosting Code LLMs with Multitask Fine-Tuning", "2311.02303",
                            "the modes read in summaries and in the released code")  # fmt: skip
    does: ClassVar = "balances the loss by source, or by row, whatever their number of tokens"
    whole_rows: ClassVar = True

    def off(self) -> bool:
        return not self.across and self.inside == "tokens"

    def check(self, ctx: Context) -> None:
        if self.inside not in ("tokens", "samples"):
            raise PlanError(f"MFTCoder.inside is {self.inside!r}.", "Use 'tokens' or 'samples'.")
        if self.weights and not self.across:
            raise PlanError("MFTCoder has weights of sources, but across is false.", "Leave one of them out.")
        if not all(_is_weight(pair) for pair in self.weights):
            raise PlanError(
                f"MFTCoder.weights are {self.weights}.",
                "Give pairs of a source and a number above 0, such as [[task, 3.0]].",
            )

    def data(self, mix: Mix, ctx: Context) -> Mix:
        """Changes nothing: looks whether there is something to balance."""
        own = set(names_of(mix.task))
        known = own.union(*({r.source for r in s.rows} for s in mix.sources if not callable(s.rows)))
        strange = [name for name, _ in self.weights if name not in known]
        if self.across and self.inside == "tokens" and not mix.sources and len(own) < 2:
            raise PlanError(
                "MFTCoder balances the sources of the mix, but no method before it adds one.",
                "Put Replay or InContextMix before it, give data.train several sets, or set MFTCoder.inside: samples.",
            )
        if strange and not any(callable(s.rows) for s in mix.sources):
            raise PlanError(
                f"MFTCoder weights the source {strange[0]!r}, but the methods before it give {sorted(known)}.",
                "Use one of these names, or put the method that adds it before MFTCoder.",
            )
        return mix

    def token_weight(self, view: View) -> torch.Tensor | None:
        sources = view.sources()
        if self.inside == "tokens" and len(sources) < 2:
            return None
        given = dict(self.weights)
        whole = sum(given.get(s, 1.0) for s in sources)
        part = {s: given.get(s, 1.0) / whole for s in sources}
        weight = [self._weight(view, row, part) if row.owner == "task" else 0.0 for row in view.packed.rows]
        return torch.as_tensor(np.take(weight, view.packed.row), dtype=torch.float32, device=view.logits.device)

    def _weight(self, view: View, row: TokenRow, part: dict[str, float]) -> float:
        """Of a token of `row`: the host divides by all tokens of the step, which is undone here."""
        source = row.source if self.across else None
        share = view.count() * (part.get(row.source, 0.0) if self.across else 1.0)
        if self.inside == "tokens":
            return share / max(1, view.count(source=source))
        return share / (max(1, view.count(source=source, per="row")) * max(1, row.num_scored))


def _is_weight(pair: Any) -> bool:
    name, number = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, 0)
    return isinstance(name, str) and isinstance(number, (int, float)) and number > 0
