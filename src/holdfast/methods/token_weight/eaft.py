"""EAFT: weight each token's loss by how unsure the model is about it, so that confident conflicts teach little.

    l_t = sg(g_t) * (-log p(y_t)),   g_t = (H_t / ln K) ** alpha,   H_t = -sum_{v in top K} q_v ln q_v

q: the probabilities of the K most likely tokens, scaled to sum to 1. sg: no gradient through the weight, which lies
between 0 (one token certain) and 1 (all K alike). Where the model is sure and the label says otherwise, plain
cross-entropy tears hardest at what it knows; there g is near 0. alpha 0 is plain fine-tuning.
Differences: the released code divides by 3.0, not by ln 20 = 2.996, so its weights are 0.14 % smaller.
It protects confident mistakes too, so it suits neither the correction of facts nor a format the model is sure to
break. The weights are below 1 and unlike DFT's not tied to the label: at one learning rate the task moves less.
Cost: a top K of the logits. Combine with: every adapt and loss method. Do not combine with: DFT and AnchoredSFT,
which weight the same tokens the other way round.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context, View

WHY = "EAFT trusts tokens the model is unsure about, DFT's weight those it is sure about; the product is neither."


@dataclass(frozen=True, kw_only=True)
class EAFT(Method):
    """Entropy-adaptive fine-tuning, arXiv 2601.02151."""

    alpha: float = 1.0  # the released code
    top_k: int = 20  # the paper

    paper: ClassVar = Paper("Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
                            "2601.02151", "read in summaries and in the released code")  # fmt: skip
    does: ClassVar = "weights each token's loss by the entropy of the model's answer there"
    strengths: ClassVar = ("alpha",)
    refuses: ClassVar = {"DFT": WHY, "AnchoredSFT": WHY}

    def off(self) -> bool:
        return self.alpha == 0

    def check(self, ctx: Context) -> None:
        if self.alpha < 0:
            raise PlanError(f"EAFT.alpha is {self.alpha}.", "Use 0 or more.")
        if self.top_k < 2:
            raise PlanError(f"EAFT.top_k is {self.top_k}, and one token has no entropy.", "Use 2 or more.")

    def token_weight(self, view: View) -> torch.Tensor:
        k = min(self.top_k, view.logits.shape[-1])
        log_q = view.logp.detach().topk(k, dim=-1).values.log_softmax(-1)  # (N, K)
        entropy = -(log_q.exp() * log_q).sum(-1)
        return (entropy / math.log(k)).clamp(0, 1) ** self.alpha  # rounding can leave the interval by 1e-7
