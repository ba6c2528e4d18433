"""DART: more of the base's own right answers for the rows it finds hard, as a source beside the task's rows.

    "prop2diff":  k_q = max(1, round(k * N * f_q / sum_q f_q))      N rows
    "uniform":    k_q = k
    f_q: share of the base's sampled answers to row q that are wrong

Every row's prompt is answered `trials` times at most, `round` samples at a time, until k_q different right answers are
there; f_q counts all samples of the row so far. Plain rejection sampling collects mostly easy rows; this does not.
Right is what the verifier says ("exact", "contains", "number", or module:function), from `least` on.
Of the mix `share` are such answers; the paper trains on them alone. The base is asked before training, in the chat
template that wrote the rows, and its answers are kept in the cache. Rows that were never solved are counted in the
report; the task's own rows still teach them.
Differences: the paper samples with a stronger model; here it is the base itself, which keeps the model's own style.
Pitfalls: a weak verifier accepts right answers with wrong reasoning, hard rows first.
Methods that hold rows out stand before it in the plan, so that no answer to those is added; else it is refused.
Cost: up to `trials` generations for each of at most `rows` rows before training. Combine with: everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from holdfast.data.asked import Asked, Reader
from holdfast.data.encoder import encoder_of
from holdfast.data.mix import Mix, Source
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import NoEffect, PlanError
from holdfast.measure.answers import room_of
from holdfast.measure.verifiers import verifier
from holdfast.method import Method, Paper
from holdfast.methods.data._few import asked_about
from holdfast.methods.data._samples import judged
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class DART(Method):
    """Difficulty-aware rejection tuning (Tong et al., NeurIPS 2024), arXiv 2407.13690."""

    mode: str = "prop2diff"  # the paper has both
    k: int = 4  # ours: right answers a row, on average
    trials: int = 16  # ours: most samples of a row
    round: int = 4  # ours: samples of a row at a time
    share: float = 0.5  # ours: the paper trains on the answers alone
    verifier: str = "contains"  # ours: the paper's is of mathematics
    least: float = 1.0  # ours
    temperature: float = 1.0  # ours
    max_new_tokens: int = 256  # ours
    rows: int | None = 2000  # ours: most rows that the base is asked about
    ended: bool = True  # ours: answers that were cut off are not taken

    paper: ClassVar = Paper("DART-Math: Difficulty-Aware Rejection Tuning for Mathematical Problem-Solving",
                            "2407.13690", "read in the README of the official code")  # fmt: skip
    does: ClassVar = "adds the base's own right answers, more of them for harder rows"
    strengths: ClassVar = ("share",)
    odds: ClassVar = strengths
    copies_rows: ClassVar = True
    refuses: ClassVar = {
        "ProMoT": "ProMoT reads the task's prompts behind a soft prompt, which DART's answers to the same would lack."
    }

    def off(self) -> bool:
        return self.share == 0

    def check(self, ctx: Context) -> None:
        verifier(self.verifier, ctx.base_dir)
        if self.mode not in ("prop2diff", "uniform"):
            raise PlanError(f"DART.mode is {self.mode!r}.", "Use 'prop2diff' or 'uniform'.")
        if not 0 <= self.share < 1 or not 0 < self.least <= 1 or self.temperature <= 0:
            what = "DART needs share of 0 or more and below 1, least above 0 and at most 1, and temperature above 0."
            raise PlanError(what, "Mend them.")
        counts = (self.k, self.round, self.max_new_tokens, 1 if self.rows is None else self.rows)
        if min(counts) < 1 or self.trials < self.round:
            what = "DART needs k, round, max_new_tokens and rows of 1, and trials of round or more."
            raise PlanError(what, "Mend them.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        right = Sampler(self, mix, ctx).collect()
        return mix.add(Source(self.name, right, self.share))

    def targets(self, wrong: Mapping[bytes, float]) -> dict[bytes, int]:
        """How many right answers each row should get, from the share of wrong ones (f_q)."""
        whole = sum(wrong.values())
        if self.mode == "uniform" or not whole:
            return dict.fromkeys(wrong, self.k)
        return {key: max(1, round(self.k * len(wrong) * f / whole)) for key, f in wrong.items()}


class Sampler:
    """Asks the base about the different rows of a task until they have their right answers."""

    def __init__(self, method: DART, mix: Mix, ctx: Context):
        self.method, self.ctx = method, ctx
        self.reader = Reader(encoder_of(ctx.model, ctx.tokenizer))
        some = asked_about(mix.trained, method.rows, method.name, ctx, "it adds none to the others")
        rows = {r.key: r for r in map(mix.mapped, some)}
        room = room_of(ctx.model) - method.max_new_tokens
        self.rows = {key: (r, a) for key, r in rows.items() if (a := self.reader.read(r)) and len(a.ids) <= room}
        self.found: dict[bytes, dict[str, TokenRow]] = {key: {} for key in self.rows}
        self.wrong: dict[bytes, float] = {}

    def collect(self) -> list[TokenRow]:
        """The right answers as rows of the source, at most k_q of each row."""
        m, asking, count = self.method, list(self.rows), 0
        while asking and count < m.trials:
            count = min(count + m.round, m.trials)
            self._ask(asking, count)
            wanted = m.targets(self.wrong)
            asking = [key for key in self.rows if len(self.found[key]) < wanted[key]]
        right = [r for key in self.rows for r in list(self.found[key].values())[: wanted[key]]] if self.rows else []
        never = sum(not f for f in self.found.values())
        self.ctx.notes.append(
            f"DART adds {len(right)} right answers; {never} of {len(self.rows)} rows were never solved"
        )
        if not right:
            what = f"DART has no right answer of the base to any of {len(self.rows)} rows (verifier {m.verifier!r})."
            raise NoEffect(what, "Raise DART.trials or max_new_tokens, choose another verifier, or take DART out.")
        return right

    def _ask(self, keys: Sequence[bytes], num: int) -> None:
        """Have `num` answers to these rows, those of earlier rounds from the cache."""
        m = self.method
        found = judged(
            {key: self.rows[key][1] for key in keys}, self.reader, self.ctx, m.verifier, num=num,
            temperature=m.temperature, max_new_tokens=m.max_new_tokens, ended=m.ended,
            words="DART: answers of the base",
        )  # fmt: skip
        for key, said in found.items():
            right = [text for text, score in said if text and score >= m.least]
            self.wrong[key] = 1 - len(right) / len(said)
            for text in right:
                made = self._made(self.rows[key][1], text, self.rows[key][0])
                if made is not None:
                    self.found[key].setdefault(" ".join(text.split()), made)

    def _made(self, asked: Asked, text: str, row: TokenRow) -> TokenRow | None:
        made = self.reader.answered(asked, text, row, self.ctx.max_length)
        return None if made is None else token_row(made.ids, int(made.scored.argmax()), "task", self.method.name)
