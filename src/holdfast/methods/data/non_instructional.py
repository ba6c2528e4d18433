"""NonInstructional: second halves of ordinary texts as answers to their first halves, mixed in. A baseline.

    prompt = the text up to the end of a sentence nearest its middle,   answer = the rest, trained on

Such rows hold no instruction, and training on them alone has been shown to bring instruction following about. Mixed in
they are cheap replay in the shape of prompt and answer. Beside Replay, which trains on every token of the same texts,
they show whether it is the shape or the text that keeps an ability.
Differences: the paper has a large model write the second half; here it is the text's own, or, with own = true, the
base's continuation of the first half.
Cost: share / (1 - share) more rows; own = true: a generation a text before training. Combine with: everything.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from holdfast.data.encoder import Encoder, stops_of
from holdfast.data.mix import Mix, Source
from holdfast.data.rows import Row, read_rows
from holdfast.data.tokens import tokenize_all
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.data._few import few
from holdfast.services import Context

ENDS = re.compile(r"[.!?]['\")\]]*(?=\s)")  # of a sentence
Halves = tuple[str, str, bool]  # the first, the second, and whether the second goes to the text's end


@dataclass(frozen=True, kw_only=True)
class NonInstructional(Method):
    """Non-instructional fine-tuning (Xie et al. 2024), arXiv 2409.00096."""

    share: float = 0.2  # ours: the paper trains on such rows alone
    sources: tuple[str, ...] = ("holdfast:general/text.jsonl",)  # ours
    own: bool = False  # ours
    max_tokens: int = 256  # ours; of a text its beginning of so many is cut in half
    pool: int = 1000  # ours: texts that are read

    paper: ClassVar = Paper("Non-instructional Fine-tuning: Enabling Instruction-Following Capabilities in "
                            "Pre-trained Language Models without Instruction-Following Data", "2409.00096",
                            "read in a summary")  # fmt: skip
    does: ClassVar = "adds second halves of texts as answers to their first halves (a baseline)"
    strengths: ClassVar = ("share",)
    odds: ClassVar = strengths

    def off(self) -> bool:
        return self.share == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.share < 1 or self.pool < 1 or self.max_tokens < 8:
            what = "NonInstructional needs share of 0 or more and below 1, pool of at least 1, max_tokens of 8."
            raise PlanError(what, "Mend them.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        pairs = [(*pair, whole) for text, whole in self._texts(ctx) if (pair := halves(text))]
        if not pairs:
            what = f"NonInstructional found no text of two sentences in {', '.join(self.sources)}."
            raise PlanError(what, "Give other NonInstructional.sources.")
        rows = self._continued(pairs, ctx) if self.own else self._given(pairs, ctx)
        return mix.add(Source(self.name, rows, self.share))

    def _texts(self, ctx: Context) -> list[tuple[str, bool]]:
        """The beginnings of the texts, of at most `max_tokens` tokens each, and whether they are whole."""
        folder, encoder = ctx.base_dir or Path.cwd(), Encoder(ctx.tokenizer)
        rows = [r for s in self.sources for r in read_rows(s, base_dir=folder, tokenizer=ctx.tokenizer)]
        most = min(self.max_tokens, ctx.max_length) - len(encoder.begin) - 1
        ids = encoder.bare([r.prompt + r.completion for r in few(rows, self.pool, self.name, ctx)])
        return [(ctx.tokenizer.decode(i[:most]).rstrip("\ufffd"), len(i) <= most) for i in ids]

    def _given(self, pairs: Sequence[Halves], ctx: Context) -> list[TokenRow]:
        rows = [Row(first, second, self.name) for first, second, _ in pairs]
        stops = stops_of(getattr(ctx.model, "generation_config", None))
        made = tokenize_all(rows, ctx.tokenizer, None, source=self.name, stops=stops)
        end = Encoder(ctx.tokenizer, stops).end
        # a text that was cut has no end to be learnt
        return [
            row if whole or row.ids[-1] != end else row.cut(len(row.ids) - 1)
            for row, (_, _, whole) in zip(made, pairs, strict=True)
        ]

    def _continued(self, pairs: Sequence[Halves], ctx: Context) -> list[TokenRow]:
        prompts = [ids[: self.max_tokens // 2] for ids in Encoder(ctx.tokenizer).prompts([p for p, *_ in pairs])]
        said = ctx.answers(
            prompts, temperature=1.0, max_new_tokens=self.max_tokens // 2, words=f"{self.name}: second halves"
        )
        pairs_of_tokens = zip(prompts, said, strict=True)
        return [token_row([*p, *ids], len(p), "task", self.name) for p, (ids,) in pairs_of_tokens if ids]


def halves(text: str) -> tuple[str, str] | None:
    """A text cut behind the sentence that ends nearest its middle; None for one sentence alone."""
    text = text.strip()
    ends = [m.end() for m in ENDS.finditer(text)]
    if not ends:
        return None
    cut = min(ends, key=lambda n: abs(n - len(text) / 2))
    return text[:cut], text[cut:]
