"""DFT: weight each token's loss by the model's own probability of it.

    l_t = sg(p(y_t)) * (-log p(y_t))

Plain cross-entropy pushes rare tokens with 1/p; the weight takes that out, so confident tokens get more, not less.
sg: no gradient through the weight; the token loss never exceeds 1/e.
Equal to TRL's SFTConfig(loss_type="dft"); here it multiplies with other token weights.
On tokens the model finds very unlikely (new knowledge, a new format) DFT learns almost nothing.
Cost: none. Combine with: every adapt and loss method. Do not combine with: AnchoredSFT, which contains it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.method import Method, Paper
from holdfast.services import View


@dataclass(frozen=True, kw_only=True)
class DFT(Method):
    """Dynamic fine-tuning, arXiv 2508.05629, equation of the abstract."""

    paper: ClassVar = Paper("On the Generalization of SFT: A Reinforcement Learning Perspective with Reward "
                            "Rectification", "2508.05629")  # fmt: skip
    does: ClassVar = "weights each token's loss by its own probability"

    def token_weight(self, view: View) -> torch.Tensor:
        return view.token_logp.detach().exp()
