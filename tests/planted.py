"""A model whose answers are planted: real weights and real generation, but after a known prompt one answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.data.tokens import Encoder
from holdfast.measure.probe import Suite


class Planted(LlamaForCausalLM):
    """After the prompts of `answers` (tokens -> tokens) the next tokens are those of the answer, then the end."""

    answers: dict[tuple[int, ...], list[int]]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **settings: Any) -> Any:
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **settings)
        for row, ids in enumerate(input_ids):
            seen = tuple(ids[attention_mask[row].bool()].tolist() if attention_mask is not None else ids.tolist())
            for prompt, answer in self.answers.items():
                if seen[: len(prompt)] == prompt:
                    rest = answer[len(seen) - len(prompt) :]
                    out.logits[row, -1] = -100.0
                    out.logits[row, -1, rest[0] if rest else self.config.eos_token_id] = 100.0
        return out


def plant(tokenizer: Any, suite: Suite, answer_of: Callable[[Any], str]) -> Planted:
    """A model that answers every probe of `suite` by `answer_of(probe)`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=2, use_cache=False,
    )  # fmt: skip
    model = Planted(config).eval()
    model.generation_config.use_cache = False
    encoder = Encoder(tokenizer)
    prompts = map(tuple, encoder.prompts([p.context for p in suite.probes]))
    answers = encoder.bare([answer_of(p) for p in suite.probes])
    model.answers = dict(zip(prompts, answers, strict=True))
    return model
