"""LoRA: train a low-rank change beside every frozen linear map.

    y = W x + s B (A x),   A (r, n), B (m, r),   s = alpha / r   (rsLoRA: alpha / sqrt(r))

A starts random and B at zero, so step 0 is the base. DoRA (`use_dora`) also trains a length per output row.
The mathematics is PEFT's; this file only chooses.
Cost: r (m + n) trained numbers per matrix; the frozen base needs no gradient and no optimizer state.
Combine with: every data and loss method (the base is one switch away), WiSEFT and LiNeS (exact on the adapter).
Do not combine with: methods that train the model's own weights (HalfFineTune, OrthogonalSubspace).
LoRA alone does not protect: see the results page.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation (Hu et al. 2021), with rsLoRA and DoRA as options.

    Raises:
        PlanError: r < 1, target_modules that match no linear layer, or a base that is itself a merged adapter and has
            no folder of its own.
    """

    r: int = 16  # usual for language models; PEFT's own default is 8
    lora_alpha: float = 32  # ours: 2 r
    lora_dropout: float = 0.0  # PEFT
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    paper: ClassVar = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
    does: ClassVar = "trains a small low-rank adapter and freezes the model's own weights"
    wraps: ClassVar = True

    @property
    def refuses(self):  # type: ignore[override]
        if not self.use_dora:
            return {}
        why = "DoRA's change of a weight is not s B A alone, so it can be neither scaled nor measured by B and A."
        return {"WiSEFT": why, "LiNeS": why, "L2ToInit": why}

    def check(self, ctx: Context) -> None:
        if self.r < 1:
            raise PlanError(f"LoRA.r is {self.r}, but a rank is at least 1.", "Try r: 16.")

    def adapt(self, model: Any, ctx: Context) -> Any:
        from peft import LoraConfig, get_peft_model

        name = str(getattr(model, "name_or_path", ""))
        if name and (Path(name) / "adapter_config.json").is_file():
            raise PlanError(
                f"LoRA would train on {name} merged into its base, which no folder holds: the new adapter would name "
                f"{name} as its base, and plain PEFT would leave that one out.",
                "Save the merged model with save_pretrained, load that folder, and train on it.",
            )
        alpha = int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha
        config = LoraConfig(
            r=self.r,
            # PEFT says int, but scales by any number
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)  # the same start whatever ran before
            try:
                return get_peft_model(model, config)
            except ValueError as e:
                raise PlanError(f"LoRA finds nothing to adapt: {e}", "Check LoRA.target_modules.") from e
