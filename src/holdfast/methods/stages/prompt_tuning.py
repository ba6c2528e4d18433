"""Prompt tuning: train a soft prompt before the task's rows, and nothing else.

    logits(x) = model([P; E(x)]),   P (p, D) trains,   P starts from embeddings of p random ordinary tokens

The model is the base to the last bit, so what is asked without P is answered as ever: nothing can be forgotten, and
what can be learnt is what a frozen model does behind p vectors. Small models learn slowly and unsteadily this way.
Differences from the paper: AdamW instead of Adafactor, whose rates (0.1 to 0.3) are larger; 20 tokens instead of 100.
The prompt stands in front of each row in packed rows too, with positions of its own; PEFT's training drops them there.
Methods that work on weights, steer, merge or bring rows (read without P) would change nothing and are refused.
Cost: p D numbers train; every row is p tokens longer, in training and after it.
Combine with: methods that choose, order or weight the task's rows and tokens. Do not combine with: LoRA, Replay,
InContextMix, KLToBase, ICLAnchor, WiSEFT.
Export: the base, and `prompt/`, a PEFT prompt-tuning adapter on it; generate with it by `use_cache=False`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.measure.soft_prompt import check_reading
from holdfast.method import Method, Paper, Stage, State
from holdfast.methods.stages._soft_prompt import ROWS_WITHOUT, alone, check_numbers, sampled, trained
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Prompt tuning (Lester et al. 2021), arXiv 2104.08691.

    Raises:
        PlanError: no tokens, a rate that is not positive, or a model that cannot read a soft prompt.
    """

    num_virtual_tokens: int = 20  # ours, as ProMoT here; paper: 100
    learning_rate: float | None = 0.05  # ours for AdamW; null takes training.learning_rate
    seed: int = 0

    paper: ClassVar = Paper(
        "The Power of Scale for Parameter-Efficient Prompt Tuning", "2104.08691", note="the id is from memory"
    )
    does: ClassVar = "trains a soft prompt for the task and leaves the model as it is"
    refuses: ClassVar = ROWS_WITHOUT

    def check(self, ctx: Context) -> None:
        check_numbers(self)
        check_reading(ctx.model, ctx.tokenizer, self.name)

    def prepare(self, ctx: Context) -> State:
        return {"init": sampled(ctx, self.num_virtual_tokens, f"PromptTuning/{self.seed}")}

    def stages(self) -> tuple[Stage, ...]:
        return alone(self.learning_rate)

    def decode(self, model: Any) -> Mapping[str, torch.Tensor]:
        return trained(model)
