"""ProMoT: first a soft prompt learns the task's format, then the model learns the task with that prompt in place.

    stage 1  freeze the model, train P (p, D), prepended to the embedded input; keep the best checkpoint
    stage 2  freeze P, still prepend it, train the model (or whatever the rest of the plan leaves trainable)
    later    prepend P for the tuned task's own prompts only; every other prompt goes to the bare model

The prompt absorbs the output format, so the weights need not. In the paper (13B encoder-decoders mostly) this keeps or
improves few-shot ability; on a decoder-only 8B model some loss remains.
Differences: steps of a run are split by `prompt_share` (paper: 5000 and 1000 steps); AdamW instead of Adafactor; the
best checkpoint is kept in stage 1 when the host can evaluate; the prompt starts from embeddings of random ordinary
tokens, as PEFT's "SAMPLE_VOCAB" (the paper's random-uniform start was ablated there). LoRA in stage 2 is an extension.
Packing in one row the model cannot see into (TRL) is refused: only the first example would get the prompt.
Cost: stage 1 stores no optimizer state beyond p * D; stage 2 reads p more tokens an example.
A model that cannot read one (no `inputs_embeds`, or tokens looked up again inside) is refused before training.
Export: the tuned model, and `prompt/`, a PEFT prompt-tuning adapter on it; generate with it by `use_cache=False`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.measure.soft_prompt import check_reading
from holdfast.method import Method, Paper, Stage, State
from holdfast.methods.stages._soft_prompt import sampled, trained
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class ProMoT(Method):
    """Prompt tuning, then model tuning (Wang et al., ICLR 2024), Sec. 4."""

    num_virtual_tokens: int = 20  # ours, for small models and short runs; paper: 100 (mT5), 50 (PaLM-8B)
    prompt_learning_rate: float = 0.05  # ours for AdamW; paper: 0.2 to 0.3 with Adafactor
    prompt_share: float = 0.5  # ours; paper: five sixths of the steps
    seed: int = 0

    paper: ClassVar = Paper("Two-stage LLM Fine-tuning with Less Specialization and More Generalization", "2211.00635")
    does: ClassVar = "trains a soft prompt first and the model second, and drops the prompt for other tasks"

    def check(self, ctx: Context) -> None:
        if self.num_virtual_tokens < 1:
            raise PlanError(f"ProMoT.num_virtual_tokens is {self.num_virtual_tokens}.", "Use at least 1.")
        if not 0 < self.prompt_share < 1:
            raise PlanError(f"ProMoT.prompt_share is {self.prompt_share}.", "Use a part between 0 and 1.")
        check_reading(ctx.model, ctx.tokenizer, self.name)

    def prepare(self, ctx: Context) -> State:
        return {"init": sampled(ctx, self.num_virtual_tokens, f"ProMoT/{self.seed}")}

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("prompt", self.prompt_share, "prompt", self.prompt_learning_rate, keep_best=True),
            Stage("model", 1 - self.prompt_share, "rest"),
        )

    def decode(self, model: Any) -> Mapping[str, torch.Tensor]:
        return trained(model)
