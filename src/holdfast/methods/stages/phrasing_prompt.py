"""PhrasingPrompt (experimental): a soft prompt behind which other phrasings are answered as the known one is.

    i: the instruction as the rows have it    i': one of `phrasings`, drawn anew for every row of a step    P (p, D)
    loss = CE(y | P, i', x) + weight * mean_t KL(p(.|i, x, y_<t) || p(.|P, i', x, y_<t))

p without P is the base: nothing but P trains, so without it every prompt is answered as ever. The base's answers to
the row as it is are the aim for the same tokens of the answer behind the other phrasing; no gradient goes there.
`instruction` is the text inside of the prompts that is said otherwise; where it is "", a phrasing stands on a line
before the whole prompt (not before what a chat template wrote). Rows that cannot be said so, or whose answer would
become other tokens, are read as they are. How far a model depends on phrasings: `measure.phrasing.spread`.
Experimental: the paper's exact loss, its sizes and where its phrasings come from could not be verified. Ours are the
KL in place of a distance of states, its weight, and the phrasings, which you should write for your task.
Cost: one more forward without gradient, of the rows as they are; p more tokens a row, in training and after it.
Combine with: methods that choose or order the task's rows. Do not combine with: LoRA, Replay, KLToBase, ICLAnchor.
Export: the base, and `prompt/`, a PEFT prompt-tuning adapter on it; generate with it by `use_cache=False`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from holdfast.data.asked import Reader
from holdfast.data.encoder import encoder_of
from holdfast.data.phrasing import reworded
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.measure.soft_prompt import check_reading
from holdfast.method import Method, Paper, Stage, State, Term
from holdfast.methods.loss._divergence import forward_kl
from holdfast.methods.stages._soft_prompt import ROWS_WITHOUT, alone, sampled, trained
from holdfast.services import Context, Look, View

SAID = "said/"  # begins the names of what the base says to the rows of a step


@dataclass(frozen=True, kw_only=True)
class PhrasingPrompt(Method):
    """Soft prompts for phrasing (Sun, Shaib and Wallace, ICLR 2024), arXiv 2306.11270; experimental.

    Raises:
        PlanError: no phrasing, values without meaning, rows without the instruction, or a model that reads no prompt.
    """

    instruction: str = ""  # ours
    phrasings: tuple[str, ...] = (  # ours
        "Read the text and give the answer.",
        "Please do the following task.",
        "Answer as briefly as you can.",
        "Here is a question for you.",
    )
    weight: float = 1.0  # beta; ours
    num_virtual_tokens: int = 10  # the paper's from memory
    learning_rate: float | None = 0.05  # ours for AdamW; null takes training.learning_rate
    seed: int = 0

    paper: ClassVar = Paper("Evaluating the Zero-shot Robustness of Instruction-tuned Language Models", "2306.11270",
                            "title from memory; its exact loss and its sizes were not verified")  # fmt: skip
    does: ClassVar = "trains a soft prompt so that other phrasings are answered as the known one (experimental)"
    strengths: ClassVar = ("weight",)
    needs: ClassVar = frozenset({"live_logits"})
    writes: ClassVar = frozenset({"ids"})
    whole_rows: ClassVar = True
    refuses: ClassVar = ROWS_WITHOUT

    def check(self, ctx: Context) -> None:
        if not self.phrasings or not all(self.phrasings):
            raise PlanError(
                "PhrasingPrompt.phrasings are missing.", "Write at least one phrasing that says something."
            )
        if self.num_virtual_tokens < 1 or self.weight < 0 or (self.learning_rate or 1) <= 0:
            what = "PhrasingPrompt needs num_virtual_tokens of at least 1, weight of 0 or more and a rate above 0."
            raise PlanError(what, "Mend them.")
        if ctx.rows and not any(reworded(r.prompt, self.instruction, p) for r in ctx.rows for p in self.phrasings):
            what = f"No row of the task can be said otherwise by PhrasingPrompt.instruction {self.instruction!r}."
            raise PlanError(what, "Give the words of the prompts that the phrasings stand for.")
        check_reading(ctx.model, ctx.tokenizer, self.name)

    def prepare(self, ctx: Context) -> State:
        return {"init": sampled(ctx, self.num_virtual_tokens, f"PhrasingPrompt/{self.seed}")}

    def stages(self) -> tuple[Stage, ...]:
        return alone(self.learning_rate)

    def decode(self, model: Any) -> Mapping[str, torch.Tensor]:
        return trained(model)

    def batch(self, rows: Sequence[TokenRow], step: int, look: Look) -> Sequence[TokenRow]:
        reader = Reader(encoder_of(look.ctx.model, look.ctx.tokenizer))
        said = [self.otherwise(r, step, reader, look.ctx) for r in rows]
        for name in [n for n in look.state if n.startswith(SAID)]:
            del look.state[name]
        changed = [n for n, new in enumerate(said) if new is not None]
        if not changed:
            return rows
        if self.weight:  # rows of nobody's task are read without the prompt: the base
            known = look.logits([replace(rows[n], owner=self.name) for n in changed])
            for n, logits in zip(changed, known, strict=True):
                new = said[n]
                assert new is not None
                look.state[SAID + new.key.hex()] = logits.float().log_softmax(-1)
        return [old if new is None else new for old, new in zip(rows, said, strict=True)]

    def otherwise(self, row: TokenRow, step: int, reader: Reader, ctx: Context) -> TokenRow | None:
        """The row behind another phrasing, with the same tokens of the answer; None where it stays as it is."""
        asked = reader.read(row) if row.of_task else None
        if asked is None:
            return None
        seed = hashlib.sha256(f"PhrasingPrompt/{ctx.seed}/{step}/".encode() + row.key).digest()
        draw = np.random.default_rng(int.from_bytes(seed[:8], "little"))
        prompt = reworded(asked.prompt, self.instruction, self.phrasings[draw.integers(len(self.phrasings))])
        new = reader.answered(replace(asked, prompt=prompt), asked.answer, row, ctx.max_length) if prompt else None
        if new is None or new.num_scored != row.num_scored or (new.ids[new.scored] != row.ids[row.scored]).any():
            return None
        return replace(new, numbers={name: _behind(a, len(new.ids), row) for name, a in row.numbers.items()})

    def loss(self, view: View) -> Term | None:
        at = view.positions("task")
        if not self.weight or not len(at):
            return None
        said = [view.state.get(SAID + r.key.hex()) for r in view.packed.rows]
        if all(one is None for one in said):
            return None
        values = [
            torch.zeros_like(mine[:, 0]) if aim is None else forward_kl(aim.to(mine.device), mine)
            for mine, aim in zip(view.packed.by_row(view.logp), said, strict=True)
        ]
        return Term(self.weight * torch.cat(values)[at], "task")


def _behind(array: np.ndarray, length: int, row: TokenRow) -> np.ndarray:
    """Numbers of the answer of `row` at the end of a row of `length` tokens."""
    out = np.zeros(length, dtype=array.dtype)
    out[-row.num_scored :] = array[-row.num_scored :]
    return out
