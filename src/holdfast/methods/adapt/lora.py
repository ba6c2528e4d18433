"""LoRA: train a low-rank change beside every frozen linear map.

    y = W x + s B (A x),   A (r, n), B (m, r),   s = alpha / r   (rsLoRA: alpha / sqrt(r))

A starts random and B at zero, so step 0 is the base. DoRA (`use_dora`) also trains a length per output row.
The mathematics is PEFT's; this file only chooses.
Cost: r (m + n) trained numbers per matrix; the frozen base needs no gradient and no optimizer state.
Combine with: every data and loss method (the base is one switch away), WiSEFT and LiNeS (exact on the adapter).
Do not combine with: methods that train the model's own weights (HalfFineTune, OrthogonalSubspace).
LoRA alone does not protect: see the leaderboard.

"all-linear" leaves out the head, and maps beside which nothing can stand: routers of experts that return more than the
product (Llama 4), grouped maps (DeepSeek V4), and weights that the layer's own code reads, perhaps in a fused kernel
(`out_proj` of Mamba and its relatives, `dt_proj` of Jamba), where an adapter would not be seen.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from holdfast.method import Paper, State
from holdfast.methods.adapt._adapter import Adapter
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank adaptation (Hu et al. 2021), with rsLoRA and DoRA as options.

    Raises:
        PlanError: r < 1, target_modules that match no linear layer or one beside which nothing can stand, or a base
            that is itself a merged adapter and has no folder of its own.
    """

    use_rslora: bool = False
    use_dora: bool = False

    paper: ClassVar = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
    does: ClassVar = "trains a small low-rank adapter and freezes the model's own weights"

    @property
    def refuses(self):  # type: ignore[override]
        if not self.use_dora:
            return {}
        why = "DoRA's change of a weight is not s B A alone, so it can be neither scaled nor measured by B and A."
        return {"WiSEFT": why, "LiNeS": why, "L2ToInit": why}

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        from peft import LoraConfig

        more = {"use_rslora": self.use_rslora, "use_dora": self.use_dora}
        return self.wrapped(model, LoraConfig(**self.peft_settings(model, **more)), ctx)
