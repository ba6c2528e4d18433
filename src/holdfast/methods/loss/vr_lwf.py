"""VRLwF (experimental): KL to the base on text made of nothing but its own vocabulary, so that no old data is needed.

    loss += weight * mean_t KL(p_base(.|c_t) || p(.|c_t)),   c_t: prefixes of made-up rows

words = "texts": rows that the base writes from nothing at temperature 1, before training; with start = "chat" they are
its answers to an empty turn of its chat template, where from nothing an instructed model may write no sense.
words = "tokens": tokens drawn at random, nearest to the paper, far from any text: the base itself is unsure there.
The method was made for image-text models: the similarity of images to words drawn at random is distilled in place of
that to the class names. This form for language models is ours, and so are how words are drawn and all defaults; the
paper's were not readable. ICLAnchor beside it protects few-shot prompts, which such rows are not.
Cost: `rows` generations before training, kept in the cache; `rows_per_step` rows in each step.
Combine with: everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.data.asked import empty_turn
from holdfast.data.encoder import Encoder, encoder_of
from holdfast.data.fewshot import can_chat
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Term
from holdfast.methods.data._few import in_turn
from holdfast.methods.loss._divergence import forward_kl
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class VRLwF(Method):
    """Learning without forgetting via replayed vocabulary (Ding et al. 2022), arXiv 2207.09248."""

    weight: float = 0.5  # ours, as KLToBase's
    words: str = "texts"  # ours
    start: str = "text"  # ours; for "texts"
    rows: int = 256  # ours: made-up rows
    max_tokens: int = 64  # ours: of each
    rows_per_step: int = 2  # ours
    temperature: float = 1.0  # ours: the base's own distribution

    paper: ClassVar = Paper("Don't Stop Learning: Towards Continual Learning for the CLIP Model", "2207.09248",
                            "read in the abstract and a summary; the form for language models is ours")  # fmt: skip
    does: ClassVar = (
        "holds the output distribution near the base's on text the base writes from nothing (experimental)"
    )
    strengths: ClassVar = ("weight",)
    needs: ClassVar = frozenset({"base_logits"})

    def off(self) -> bool:
        return self.weight == 0 or self.rows_per_step == 0

    def check(self, ctx: Context) -> None:
        if self.words not in ("texts", "tokens"):
            raise PlanError(f"VRLwF.words is {self.words!r}.", "Use 'texts' or 'tokens'.")
        if self.start not in ("text", "chat"):
            raise PlanError(f"VRLwF.start is {self.start!r}.", "Use 'text' or 'chat'.")
        if self.weight < 0 or min(self.rows, self.rows_per_step) < 1 or self.max_tokens < 2 or self.temperature <= 0:
            what = (
                "VRLwF needs weight of at least 0, rows and rows_per_step of 1, max_tokens of 2, temperature above 0."
            )
            raise PlanError(what, "Mend them.")
        if self.start == "chat" and not can_chat(ctx.tokenizer):
            raise PlanError("VRLwF.start is 'chat', but the tokenizer has no chat template.", "Use 'text'.")

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        first = self._first(ctx)
        made = self._drawn(ctx) if self.words == "tokens" else self._written(first, ctx)
        start = len(first) if self.start == "chat" and self.words == "texts" else 1
        return [
            token_row([*first, *ids], start, self.name, self.name) for ids in made if len(first) + len(ids) > start
        ]

    def _first(self, ctx: Context) -> list[int]:
        """The tokens that every row begins with, at least one."""
        if self.start == "chat" and self.words == "texts":
            return Encoder(ctx.tokenizer).prompts([empty_turn(ctx.tokenizer)])[0]
        first = encoder_of(ctx.model, ctx.tokenizer).first
        return list(first) or self._vocabulary(ctx)[:1]

    def _written(self, first: Sequence[int], ctx: Context) -> list[list[int]]:
        (texts,) = ctx.answers(
            [first], num=self.rows, temperature=self.temperature, max_new_tokens=self.max_tokens,
            words=f"{self.name}: texts of the base",
        )  # fmt: skip
        return texts

    def _drawn(self, ctx: Context) -> list[list[int]]:
        draw, known = np.random.default_rng(ctx.seed), self._vocabulary(ctx)
        return [[known[i] for i in draw.integers(len(known), size=self.max_tokens)] for _ in range(self.rows)]

    def _vocabulary(self, ctx: Context) -> list[int]:
        special = set(ctx.tokenizer.all_special_ids)
        return [i for i in range(len(ctx.tokenizer)) if i not in special]

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        return in_turn(step, self.rows_per_step, pool)

    def loss(self, view: View) -> Term | None:
        at = view.positions(self.name)
        if not len(at):
            return None
        return Term(self.weight * forward_kl(view.base_logp(self.name), view.logp[at]), self.name)
