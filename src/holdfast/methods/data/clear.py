"""CLEAR (one round): rows whose answer the base does not trust are left out.

    c_i = mix * agreement_i + (1 - mix) * reflection_i,   a row stays if c_i >= gamma
    agreement_i: mean score, by a verifier, of `samples` answers of the base to the prompt against the given answer
    reflection_i: the base's probability that the given answer is right, of a yes-or-no question asked twice, with the
                  choices in both orders

gamma None is the median, which leaves out less than half. Of all rows never more than `most` are left out: those of
the lowest c. The base is asked once, before training; answers are kept in the cache. The report says how many rows
went, and verdicts.json in the run's folder says of each row that was asked about: its number among the task's rows,
its key (a hash of its tokens and targets), c (null: it could not be read) and whether it is kept.
Wrong labels make the model move where nothing is to be learnt.
Differences: this is Auto-Filter alone. Auto-Correct, which lets the tuned model propose better answers and trains
again from the start, is not offered.
Agreement is the verifier's instead of an entailment model's; `mix`, `question`, the number of samples and gamma were
not readable and are ours.
Pitfall: what the base cannot know looks wrong to it. Where the rows teach new facts this filters them out.
Rows whose question the model cannot read have agreement alone.
Cost: `samples` generations and four short forwards for each of at most `rows` rows before training.
Combine with: everything.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.data.asked import Asked, Reader, fits_chats
from holdfast.data.encoder import encoder_of
from holdfast.data.mix import Mix
from holdfast.engine.base import token_logp
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.measure.answers import room_of
from holdfast.measure.verifiers import verifier
from holdfast.method import Method, Paper
from holdfast.methods.data._few import asked_about
from holdfast.methods.data._samples import judged
from holdfast.services import Context

QUESTION = (
    "{prompt}\n\nProposed answer: {answer}\n\nIs the proposed answer right?\n(A) {first}\n(B) {second}\n"
    "The letter of the right choice is"
)
LETTERS = (" A", " B")


@dataclass(frozen=True, kw_only=True)
class CLEAR(Method):
    """Confidence-based filtering of fine-tuning data (Chen and Mueller 2024), arXiv 2403.12776."""

    gamma: float | None = None  # ours: the median
    most: float = 0.5  # ours: largest share of the rows that is left out
    samples: int = 5  # the paper: 5 to 10
    mix: float = 0.7  # ours
    verifier: str = "contains"  # ours
    question: str = QUESTION  # ours
    temperature: float = 1.0  # the paper
    max_new_tokens: int = 64  # ours
    rows: int | None = 2000  # ours: most rows that the base is asked about; the others stay

    paper: ClassVar = Paper("Automated Data Curation for Robust Language Model Fine-Tuning", "2403.12776",
                            "read in the abstract and a summary; thresholds and weights are ours")  # fmt: skip
    does: ClassVar = "leaves out rows whose answer the base does not trust"

    def off(self) -> bool:
        return self.most == 0 or self.gamma == 0

    def check(self, ctx: Context) -> None:
        verifier(self.verifier, ctx.base_dir)
        if not 0 <= self.most < 1 or not 0 <= self.mix <= 1 or (self.gamma is not None and not 0 <= self.gamma <= 1):
            raise PlanError("CLEAR needs gamma and mix from 0 to 1, and most of 0 or more and below 1.", "Mend them.")
        counts = (self.samples, self.max_new_tokens, 1 if self.rows is None else self.rows)
        if min(counts) < 1 or self.temperature <= 0:
            what = "CLEAR needs samples, max_new_tokens and rows of at least 1, and temperature above 0."
            raise PlanError(what, "Mend them.")
        if not fits_chats(self.question) or any(
            f"{{{n}}}" not in self.question for n in ("answer", "first", "second")
        ):
            what = "CLEAR.question must begin with {prompt} and hold {answer}, {first} and {second}."
            raise PlanError(what, "Write them into it.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        numbers = asked_about(range(len(mix.task)), self.rows, self.name, ctx, "the others stay")
        rows = [mix.task[n] for n in numbers]
        trust = self.confidence(rows, ctx)
        sure = np.asarray([trust.get(r.key, 1.0) for r in rows])
        least = self.threshold(sure)
        ctx.notes.append(f"CLEAR leaves out {(sure < least).sum()} of {len(sure)} rows: confidence below {least:.3f}")
        ctx.verdicts[self.name] = [
            {
                "row": n,
                "key": hashlib.sha256(row.key).hexdigest()[:16],
                "confidence": trust.get(row.key),
                "verdict": "kept" if c >= least else "left out",
            }
            for n, row, c in zip(numbers, rows, sure.tolist(), strict=True)
        ]
        return mix.with_filter(self.name, lambda row: trust.get(row.key, 1.0) >= least)

    def threshold(self, sure: np.ndarray) -> float:
        """The least confidence of rows that stay, from those of all rows (n,)."""
        gamma = float(np.median(sure)) if self.gamma is None else self.gamma
        return min(gamma, float(np.sort(sure)[int(self.most * len(sure))]))

    def confidence(self, rows: Sequence[TokenRow], ctx: Context) -> dict[bytes, float]:
        """c of every row that can be read as a prompt and an answer, by its key."""
        reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        room = room_of(ctx.model) - self.max_new_tokens
        read = {r.key: reader.read(r) for r in rows}
        asked = {key: a for key, a in read.items() if a and len(a.ids) <= room}
        agree, reflect = self._agreement(asked, reader, ctx), self._reflection(asked, reader, ctx)
        if alone := len(asked) - len(reflect):
            ctx.notes.append(
                f"CLEAR judges {alone} rows by agreement alone: the model cannot be asked about their answer"
            )
        return {key: self.mix * agree[key] + (1 - self.mix) * reflect.get(key, agree[key]) for key in asked}

    def _agreement(self, asked: Mapping[bytes, Asked], reader: Reader, ctx: Context) -> dict[bytes, float]:
        found = judged(
            asked, reader, ctx, self.verifier, num=self.samples, temperature=self.temperature,
            max_new_tokens=self.max_new_tokens, ended=False, words="CLEAR: answers of the base",
        )  # fmt: skip
        return {key: sum(score for _, score in said) / len(said) for key, said in found.items()}

    def _reflection(self, asked: Mapping[bytes, Asked], reader: Reader, ctx: Context) -> dict[bytes, float]:
        """Of the rows whose question the model can read."""
        letters = reader.encoder.bare(LETTERS)
        room = room_of(ctx.model) - max(map(len, letters))
        shown = {key: self._shown(a, reader) for key, a in asked.items()}
        fits = {key: both for key, both in shown.items() if all(ids and len(ids) <= room for ids in both)}
        if not fits:
            return {}
        rows = [
            token_row([*ids, *letter], len(ids), self.name)
            for both in fits.values() for ids in both if ids for letter in letters
        ]  # fmt: skip
        logp = np.asarray([p.sum() for p in token_logp(ctx.model, rows)]).reshape(-1, 2, 2)  # row, order, letter
        chosen = np.exp(logp - np.logaddexp(logp[..., :1], logp[..., 1:]))
        yes = (chosen[:, 0, 0] + chosen[:, 1, 1]) / 2
        return dict(zip(fits, yes.tolist(), strict=True))

    def _shown(self, asked: Asked, reader: Reader) -> list[list[int] | None]:
        """The question in both orders of its choices."""
        orders = ({"first": "Yes", "second": "No"}, {"first": "No", "second": "Yes"})
        return [reader.filled(asked, self.question, {"answer": asked.answer, **order}) for order in orders]
