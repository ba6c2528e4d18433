"""S3FT: train on the base's own answers where they are right, on its paraphrases of the given ones, else on these.

    target = y1 if ok(y1, y)     y1: the base's answer to the row's own prompt
             y2 if ok(y2, y)     y2: the base's answer to the prompt with the given answer y in it
             y  otherwise

Then ordinary training on the targets. `ok` is a verifier: "exact", "contains", "number", or module:function with
(answer, reference, row) -> 0..1, right from `least` on. With "exact" a right answer is the given one, so nothing
changes, and the run is refused. An answer that did not end within `max_new_tokens` is not taken; where the given
answer is one line behind a plain prompt, the first line counts. The base is asked once, before training, in the chat
template that wrote the rows; answers are kept in the cache. own = false leaves y1 out: every answer is rewritten, as
in the self-distillation of arXiv 2402.13669. The paper's own wording of y2 was not readable: ours is `rewrite`, where
{prompt} and {answer} stand for their texts (for chats it must begin with {prompt}).
Pitfalls: a weak verifier accepts wrong answers; the model keeps its own style, so do not use it where the style of the
given answers is the task; a paraphrase may say that it was shown the answer.
Cost: one or two generations a row before training. Combine with: LoRA, Replay, everything.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from holdfast.data.asked import Asked, Reader, fits_chats
from holdfast.data.encoder import encoder_of
from holdfast.data.mix import Mix
from holdfast.data.rendered import Rendered
from holdfast.data.rows import Row
from holdfast.engine.pack import TokenRow
from holdfast.errors import NoEffect, PlanError
from holdfast.measure.answers import room_of
from holdfast.measure.verifiers import verifier
from holdfast.method import Method, Paper
from holdfast.services import Context

CHAT = "{prompt}\n\nThe right answer is:\n{answer}\n\nGive this answer in your own words, and nothing else."
PLAIN = "{prompt}{answer}\n\n{prompt}"  # a model that goes on with texts is shown the text once before
SELF, PARAPHRASE, GOLD = "own answers", "paraphrases", "given answers"


@dataclass(frozen=True, kw_only=True)
class S3FT(Method):
    """Selective self-to-supervised fine-tuning (Gupta et al. 2025), arXiv 2502.08130."""

    verifier: str = "contains"  # ours: the paper chooses by task
    least: float = 1.0  # ours
    rewrite: str | None = None  # ours; None: by the kind of row, a chat or plain text
    max_new_tokens: int = 256  # ours
    temperature: float = 0.0  # ours: the likeliest answer
    top_p: float = 1.0  # ours: all tokens
    ended: bool = True  # ours: answers that were cut off are not taken
    own: bool = True  # the paper; false: rewriting alone

    paper: ClassVar = Paper("Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models",
                            "2502.08130", "the wording of the rewrite prompt was not readable")  # fmt: skip
    does: ClassVar = "trains on the base's own answers where they are right"

    def check(self, ctx: Context) -> None:
        verifier(self.verifier, ctx.base_dir)
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 < self.least <= 1:
            raise PlanError(
                "S3FT needs max_new_tokens of at least 1, temperature of at least 0, top_p and least above 0 and at "
                "most 1.",
                "Mend them.",
            )
        if self.rewrite is not None and "{answer}" not in self.rewrite:
            raise PlanError("S3FT.rewrite does not show the answer.", "Write {prompt} and {answer} into it.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        return mix.map(Exchange(self, mix, ctx))


class Exchange:
    """A map over rows: a task row gets its chosen target. The base is asked when the first row is drawn."""

    def __init__(self, method: S3FT, mix: Mix, ctx: Context):
        self.method, self.mix, self.ctx = method, mix, ctx

    def __call__(self, row: TokenRow) -> TokenRow:
        return self.table.get(row.key, row) if row.of_task else row

    @cached_property
    def table(self) -> dict[bytes, TokenRow]:
        """The chosen row for each task row that changes, by its key."""
        rows = [self.mix.mapped(r) for r in self.mix.kept]
        chosen, counts = self.choose(rows)
        said = ", ".join(f"{counts[kind]} {kind}" for kind in (SELF, PARAPHRASE, GOLD))
        self.ctx.notes.append(f"S3FT trains on {said} for {len(rows)} rows (verifier {self.method.verifier})")
        changed = {key: row for key, row in chosen.items() if row.key != key}
        if not changed:
            raise NoEffect(
                f"S3FT would train on the given answers alone: of {len(rows)} rows it found {said}, none of them in "
                f"other words (verifier {self.method.verifier!r}).",
                "Choose another verifier or a larger max_new_tokens, or take S3FT out of the plan.",
            )
        return changed

    def choose(self, rows: Sequence[TokenRow]) -> tuple[dict[bytes, TokenRow], Counter[str]]:
        """The target of every row by its key, and how many of the rows have which kind."""
        m, ctx = self.method, self.ctx
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        judge = verifier(m.verifier, ctx.base_dir)
        distinct = {r.key: r for r in rows}
        asked = {key: a for key, r in distinct.items() if (a := reader.read(r))}
        chosen, kind = dict(distinct), dict.fromkeys(distinct, GOLD)

        def take(name: str, prompts: dict[bytes, list[int]]) -> None:
            for key, text in self._said(prompts, asked, reader, name).items():
                reference = asked[key].answer
                right = judge(text, reference, Row(asked[key].prompt, reference)) >= m.least
                made = reader.answered(asked[key], text, distinct[key], ctx.max_length) if right else None
                if made is not None:
                    chosen[key], kind[key] = made, name

        if m.own:
            take(SELF, {key: a.ids for key, a in asked.items()})
        shown = {key: self._shown(a, reader) for key, a in asked.items() if kind[key] == GOLD}
        take(PARAPHRASE, {key: ids for key, ids in shown.items() if ids})
        return chosen, Counter(kind[r.key] for r in rows)

    def _shown(self, asked: Asked, reader: Reader) -> list[int] | None:
        """The prompt that shows the given answer; None where a chat cannot be asked so."""
        chat = isinstance(asked.prompt, Rendered)
        template = self.method.rewrite or (CHAT if chat else PLAIN)
        if chat and not fits_chats(template):
            raise PlanError(
                "S3FT.rewrite cannot be asked in a chat: it must begin with {prompt} and hold it once.",
                "Put what you ask behind {prompt}.",
            )
        return reader.filled(asked, template, {"answer": asked.answer if chat else asked.lead + asked.answer})

    def _said(
        self, prompts: dict[bytes, list[int]], asked: dict[bytes, Asked], reader: Reader, words: str
    ) -> dict[bytes, str]:
        """What the base says to each prompt that leaves room for it, of what may be taken."""
        m = self.method
        room = room_of(self.ctx.model) - m.max_new_tokens
        texts: dict[bytes, str | None] = {}
        for line in (True, False):
            fits = {key: ids for key, ids in prompts.items() if len(ids) <= room and asked[key].one_line == line}
            found = self.ctx.answers(
                list(fits.values()), temperature=m.temperature, top_p=m.top_p, max_new_tokens=m.max_new_tokens,
                stop=("\n",) if line else (), words=f"S3FT: {words}",
            )  # fmt: skip
            texts |= {key: reader.said(one[0], asked[key], m.ended) for key, one in zip(fits, found, strict=True)}
        return {key: text for key, text in texts.items() if text}
