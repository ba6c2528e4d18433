"""FAIT (experimental): weight the tokens of an answer by which it differs from a wrong one much like it.

    loss = mean_t w_t * (-log p(y_t)),   w_t = 1 + (line * L_t + token * D_t) * sg(1 - p_row)

D_t: 1 for tokens of the right answer that stand otherwise in the wrong one, found by difflib over tokens; L_t: 1 for
all tokens of a line that holds such a token; p_row: the model's probability of the row's D tokens, their geometric
mean, without gradient: what it knows already weighs as in plain training. The wrong answer is the base's own: of
`tries` samples of its answer to the row's prompt those that the verifier calls wrong, and of these the one most like
the right one. A row without one has weight 1. The base is asked once, before training, answers are kept in the cache.
Differences: in the paper another model writes the wrong variant, lines and characters are compared as text, and the
weight comes from the probabilities of the right and the wrong segment; its formula was not readable, so w is a
reconstruction, and `line` and `token` are ours.
Pitfalls: weighting unlikely tokens moves the model more. Answers of few tokens (labels) differ everywhere.
Methods that change targets (S3FT) stand before it in the plan.
Cost: `tries` generations for each of at most `rows` rows before training.
Combine with: KLToBase or ICLAnchor; every adapt method.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from holdfast.data.asked import Asked, Reader
from holdfast.data.encoder import encoder_of
from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow
from holdfast.errors import NoEffect, PlanError
from holdfast.measure.answers import room_of
from holdfast.measure.verifiers import verifier
from holdfast.method import Method, Paper
from holdfast.methods.data._few import asked_about
from holdfast.methods.data._samples import judged
from holdfast.services import Context, View

TOKEN, LINE = "FAIT/token", "FAIT/line"  # under which the marks stand in the rows
Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class FAIT(Method):
    """Fault-aware fine-tuning (Fan et al. 2025), arXiv 2503.16913."""

    line: float = 0.5  # ours
    token: float = 1.0  # ours
    verifier: str = "contains"  # ours
    tries: int = 4  # ours
    temperature: float = 1.0  # ours
    max_new_tokens: int = 256  # ours
    rows: int | None = 2000  # ours: most rows that the base is asked about; the others have weight 1

    paper: ClassVar = Paper("FAIT: Fault-Aware Fine-Tuning for Better Code Generation", "2503.16913",
                            "the formula of its weight was not readable: w is a reconstruction")  # fmt: skip
    does: ClassVar = "weights the tokens by which a right answer differs from a wrong one much like it (experimental)"
    writes: ClassVar = frozenset({TOKEN, LINE})
    whole_rows: ClassVar = True

    def off(self) -> bool:
        return self.line == 0 and self.token == 0

    def check(self, ctx: Context) -> None:
        verifier(self.verifier, ctx.base_dir)
        counts = (self.tries, self.max_new_tokens, 1 if self.rows is None else self.rows)
        if min(self.line, self.token) < 0 or min(counts) < 1 or self.temperature <= 0:
            what = "FAIT needs line and token of 0 or more, tries, max_new_tokens and rows of 1, temperature above 0."
            raise PlanError(what, "Mend them.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        return mix.map(Marks(self, mix, ctx))

    def token_weight(self, view: View) -> torch.Tensor:
        differs, lines = view.number(TOKEN, missing=0.0), view.number(LINE, missing=0.0)
        at = torch.as_tensor(view.packed.row, device=differs.device)
        sums, counts = (differs.new_zeros(len(view.packed.rows)) for _ in range(2))
        sums.index_add_(0, at, differs * view.token_logp.detach())
        counts.index_add_(0, at, differs)
        known = (sums / counts.clamp(min=1)).exp()[at]
        return 1 + (self.line * lines + self.token * differs) * (1 - known)


class Marks:
    """A map over rows: a task row gets its marks. The base is asked when the first row is drawn."""

    def __init__(self, method: FAIT, mix: Mix, ctx: Context):
        self.method, self.mix, self.ctx = method, mix, ctx

    def __call__(self, row: TokenRow) -> TokenRow:
        marks = self.table.get(row.key) if row.of_task else None
        return replace(row, numbers={**row.numbers, **marks}) if marks else row

    @cached_property
    def table(self) -> dict[bytes, dict[str, np.ndarray]]:
        """The marks of each row that has a wrong answer, by its key."""
        reader = Reader(encoder_of(self.ctx.model, self.ctx.tokenizer))
        some = asked_about(self.mix.kept, self.method.rows, self.method.name, self.ctx, "the others have weight 1")
        rows = {r.key: r for r in map(self.mix.mapped, some)}
        room = room_of(self.ctx.model) - self.method.max_new_tokens
        asked = {key: a for key, r in rows.items() if (a := reader.read(r)) and len(a.ids) <= room}
        found = {key: self._marks(rows[key], wrong, reader) for key, wrong in self._wrong(asked, rows, reader).items()}
        found = {key: marks for key, marks in found.items() if marks[TOKEN].any()}
        said = f"{len(found)} of {len(rows)} different rows (verifier {self.method.verifier})"
        self.ctx.notes.append(f"FAIT has a wrong answer to compare with for {said}")
        if not found:
            what = f"FAIT weights what differs from a wrong answer of the base, but there is one for {said}."
            raise NoEffect(what, "Raise FAIT.tries or max_new_tokens, choose another verifier, or take FAIT out.")
        return found

    def _wrong(self, asked: dict[bytes, Asked], rows: dict[bytes, TokenRow], reader: Reader) -> dict[bytes, list[int]]:
        """For each row the targets of the wrong answer that is most like its own."""
        m, ctx = self.method, self.ctx
        samples = judged(
            asked, reader, ctx, m.verifier, num=m.tries, temperature=m.temperature, max_new_tokens=m.max_new_tokens,
            ended=False, words="FAIT: answers of the base",
        )  # fmt: skip
        found: dict[bytes, list[int]] = {}
        for key, said in samples.items():
            wrong = dict.fromkeys(text for text, score in said if text and score < 1)
            made = [reader.answered(asked[key], text, rows[key], ctx.max_length) for text in wrong]
            own = _targets(rows[key])
            likest = max((r for r in made if r), key=lambda r: _matcher(own, _targets(r)).ratio(), default=None)
            if likest is not None:
                found[key] = _targets(likest)
        return found

    def _marks(self, row: TokenRow, wrong: Ids, reader: Reader) -> dict[str, np.ndarray]:
        own = _targets(row)
        breaks = ["\n" in reader.text([i]) for i in own]
        out = {}
        for name, marks in zip((TOKEN, LINE), differences(own, wrong, breaks), strict=True):
            out[name] = np.zeros(len(row.ids), dtype=np.float32)
            out[name][row.scored] = marks
        return out


def differences(right: Ids, wrong: Ids, breaks: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """Of each token of `right`, whether it stands otherwise in `wrong`, and whether such a token is in its line.

    breaks: whether a token ends its line.
    """
    differs = [True] * len(right)
    for at, _, size in _matcher(right, wrong).get_matching_blocks():
        differs[at : at + size] = [False] * size
    line_of = np.cumsum([0, *breaks[:-1]]).tolist()
    touched = {n for n, d in zip(line_of, differs, strict=True) if d}
    return differs, [n in touched for n in line_of]


def _matcher(a: Ids, b: Ids) -> SequenceMatcher:
    return SequenceMatcher(None, list(a), list(b), autojunk=False)


def _targets(row: TokenRow) -> list[int]:
    return row.predicted[row.scored].tolist()
