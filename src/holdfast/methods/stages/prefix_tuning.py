"""Prefix tuning: train keys and values that every layer finds before the task's rows, and nothing else.

    attention_l(q) over [K_l; k_1 ... k_t], [V_l; v_1 ... v_t]     K_l, V_l (p, H, D) train, for every layer l

The model is the base to the last bit: without the prefix everything is answered as ever. Unlike a soft prompt the
prefix acts in every layer by itself, so it has 2 L times the numbers and learns faster; it is not the base at the
start. H: heads of keys, fewer than those of queries under grouped-query attention.
It starts from the keys and values of random ordinary tokens. Differences from the papers: no net that makes the prefix
from a smaller table (PEFT's `prefix_projection`, off there too), AdamW, 20 positions. P-tuning v2 is the same prefix.
Rows are read behind it with padding, never end to end; gradient checkpointing drops it and is refused. A model whose
layers keep unequal keys and values, or none, is refused before training.
Methods that work on weights, steer, merge or bring rows (read without it) would change nothing and are refused.
Cost: 2 L p H D numbers train; attention reads p more positions, in training and after it.
Combine with: methods that choose, order or weight the task's rows and tokens. Do not combine with: LoRA, Replay,
InContextMix, KLToBase, ICLAnchor, WiSEFT.
Export: the base, and `prompt/`, a PEFT prefix-tuning adapter on it; generate with it by `use_cache=False`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.engine.prefix import prefix_of
from holdfast.engine.ways import inner
from holdfast.measure.soft_prompt import check_reading
from holdfast.method import Method, Paper, Stage, State
from holdfast.methods.stages._soft_prompt import ROWS_WITHOUT, alone, check_numbers, ordinary, trained
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Prefix tuning (Li and Liang 2021), arXiv 2101.00190; in every layer, as P-tuning v2, 2110.07602.

    Raises:
        PlanError: no positions, a rate that is not positive, or a model that cannot read a prefix.
    """

    num_virtual_tokens: int = 20  # ours, as PromptTuning here
    learning_rate: float | None = 5e-3  # ours for AdamW: 1e-3 to 1e-2 are usual; null takes training.learning_rate
    seed: int = 0

    paper: ClassVar = Paper(
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        "2101.00190",
        note="title and ids are from memory",
    )
    does: ClassVar = "trains keys and values before the task's rows in every layer and leaves the model as it is"
    prefix: ClassVar = True
    refuses: ClassVar = ROWS_WITHOUT

    def check(self, ctx: Context) -> None:
        check_numbers(self)
        check_reading(ctx.model, ctx.tokenizer, self.name, prefix=True)

    def prepare(self, ctx: Context) -> State:
        model = inner(ctx.model)
        was_training = model.training
        start = prefix_of(model.eval(), ordinary(ctx, self.num_virtual_tokens, f"PrefixTuning/{self.seed}"))
        model.train(was_training)
        return {"init": start.float()}

    def stages(self) -> tuple[Stage, ...]:
        return alone(self.learning_rate)

    def decode(self, model: Any) -> Mapping[str, torch.Tensor]:
        return trained(model)
