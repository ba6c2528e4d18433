"""MORepair: learn to answer and to say why, two objectives on the same rows.

    loss = (L_answer + weight * L_why) / (1 + weight)

L_answer: the task's loss; L_why: the mean over the tokens of explanations of -log p. Explanations come from `sources`,
files of prompts and explanations, or else from the base itself: before training it is shown prompt and answer by
`ask`, and what it says is learnt behind `prompt`, which does not show the answer ({prompt} and {answer} stand for
their texts; for chats both begin with {prompt}). `rows_per_step` of them join each step; they have their own count, so
their length does not water down the task.
Differences: the paper's explanations are a larger model's, each trained in one batch with its answer and with loss on
the prompt as well; here they take turns by themselves, and only what is said is trained on. The paper's weight was
not readable. A small base explains badly: give files then.
Cost: a generation a row before training; the explanations' tokens in each step.
Combine with: everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.data.asked import Reader, fits_chats
from holdfast.data.encoder import encoder_of
from holdfast.data.rendered import Rendered
from holdfast.data.tokens import tokenize_all
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import NoEffect, PlanError
from holdfast.measure.answers import room_of
from holdfast.method import Method, Paper, Term
from holdfast.methods.data._few import few, in_turn
from holdfast.methods.data.replay import read_sources
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class MORepair(Method):
    """Multi-objective fine-tuning of MORepair (Yang et al., TOSEM), arXiv 2404.12636."""

    weight: float = 1.0  # ours
    sources: tuple[str, ...] = ()  # files of explanations; () lets the base write them
    ask: str = "{prompt}{answer}\n\nExplain in one sentence why this answer is right:"  # ours
    prompt: str = "{prompt}\n\nExplain in one sentence what is right here and why:"  # ours
    rows: int = 256  # ours: most rows that the base explains
    max_new_tokens: int = 64  # ours
    rows_per_step: int = 2  # ours: the paper has one for each answer

    paper: ClassVar = Paper("MORepair: Teaching LLMs to Repair Code via Multi-Objective Fine-Tuning", "2404.12636",
                            "its id was not checked; read in summaries and in the released code")  # fmt: skip
    does: ClassVar = "learns explanations of the answers beside the answers"
    strengths: ClassVar = ("weight",)

    @property
    def refuses(self):  # type: ignore[override]
        why = "MORepair has all rows of the task explained, and learns of those too that it keeps out of training."
        return {} if self.sources else dict.fromkeys(("CoBa", "SkillIt"), why)

    def off(self) -> bool:
        return self.weight == 0 or self.rows_per_step == 0

    def check(self, ctx: Context) -> None:
        if self.weight < 0 or min(self.rows, self.max_new_tokens, self.rows_per_step) < 1:
            what = "MORepair needs weight of at least 0, and rows, max_new_tokens and rows_per_step of at least 1."
            raise PlanError(what, "Mend them.")
        if "{answer}" not in self.ask or "{prompt}" not in self.prompt or "{answer}" in self.prompt:
            what = "MORepair.ask must hold {answer}, MORepair.prompt must hold {prompt} and not {answer}."
            raise PlanError(what, "Mend them.")
        if not self.sources and not ctx.rows:
            raise PlanError(
                "MORepair has the base explain the task's rows, but they are not known as prompts and answers.",
                "Give prompt/completion rows, or files of explanations as MORepair.sources.",
            )

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        if self.sources:
            cut = (r.cut(ctx.max_length) for r in read_sources(self.sources, ctx, owner=self.name))
            return [r for r in cut if r.scored.any()]
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        some = few(ctx.rows, self.rows, self.name, ctx)
        asked = [a for r in tokenize_all(some, ctx.tokenizer, None) if (a := reader.read(r))]
        if any(isinstance(a.prompt, Rendered) for a in asked) and not (
            fits_chats(self.ask) and fits_chats(self.prompt)
        ):
            what = "MORepair.ask and MORepair.prompt cannot be asked in a chat: both must begin with {prompt}."
            raise PlanError(what, "Put what you ask behind {prompt}.")
        shown = [reader.filled(a, self.ask, {"answer": a.lead + a.answer}) for a in asked]
        read = [reader.filled(a, self.prompt, {}) for a in asked]
        room = room_of(ctx.model) - self.max_new_tokens
        pairs = [(s, p) for s, p in zip(shown, read, strict=True) if s and p and len(s) <= room]
        said = ctx.answers([s for s, _ in pairs], max_new_tokens=self.max_new_tokens, words="MORepair: explanations")
        made = [
            token_row([*p, *ids], len(p), self.name, self.name)
            for (_, p), (ids,) in zip(pairs, said, strict=True)
            if ids
        ]
        fits = [r for r in made if len(r.ids) <= ctx.max_length]
        if not fits:
            what = f"MORepair has no explanation of any of {len(asked)} rows."
            raise NoEffect(what, "Give files of explanations as MORepair.sources, or take MORepair out of the plan.")
        return fits

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        return in_turn(step, self.rows_per_step, pool)

    def token_weight(self, view: View) -> torch.Tensor:
        return torch.full_like(view.token_logp, 1 / (1 + self.weight))

    def loss(self, view: View) -> Term | None:
        at = view.positions(self.name)
        if not len(at):
            return None
        return Term(-view.token_logp[at] * (self.weight / (1 + self.weight)), self.name)
