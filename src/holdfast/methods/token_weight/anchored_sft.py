"""Anchored SFT: DFT's token weights and a KL to the base that stops DFT from drifting.

    l_t = sg(p(y_t)) * (-log p(y_t)) + weight * KL(p_base(.|c_t) || p(.|c_t))

Full vocabulary, forward KL, at the same answer positions. weight 0 is DFT.
Reference: the base's answers stored once (exact), or the adapter switched off.
Cost: one forward of the base over the task rows, once. Combine with: every adapt method.
Do not combine with: DFT and KLToBase (contained), ProMoT (the base has no prompt).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Term
from holdfast.methods.loss._divergence import forward_kl
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class AnchoredSFT(Method):
    """ASFT (Zhu et al., ICLR 2026), arXiv 2509.23753."""

    weight: float = 0.05  # ICLR text (secondary source); the released code uses 0.1

    paper: ClassVar = Paper("Anchored Supervised Fine-Tuning", "2509.23753",
                            "the default was read in a secondary source")  # fmt: skip
    does: ClassVar = "weights tokens by their probability and adds a KL to the base on the answers"
    strengths: ClassVar = ("weight",)
    needs: ClassVar = frozenset({"base_logits"})
    refuses: ClassVar = {
        "DFT": "AnchoredSFT already contains DFT's weight, and twice would be p squared.",
        "KLToBase": "AnchoredSFT already contains a KL to the base; ICLAnchor is the one to add for other prompts.",
        "ProMoT": "ProMoT reads the task with a soft prompt, which the base it would be compared with does not have.",
        "PrefixTuning": "a prefix is read with the task, which the base it would be compared with does not have.",
        "PromptTuning": "a soft prompt is read with the task, which the base it would be compared with does not have.",
    }

    def check(self, ctx: Context) -> None:
        if self.weight < 0:
            raise PlanError(f"AnchoredSFT.weight is {self.weight}.", "Use 0 or more.")

    def token_weight(self, view: View) -> torch.Tensor:
        return view.token_logp.detach().exp()

    def loss(self, view: View) -> Term | None:
        if not self.weight:
            return None
        at = view.positions("task")
        return Term(self.weight * forward_kl(view.base_logp("task"), view.logp[at]), "task")
