"""GeRe: a fixed set of ordinary text, trained on and held inside the base's activation bands.

    h0, h: last hidden states (T, D) of base and model on the text;   mu, sd: over all tokens, for each dimension
    lo = mu - sd,  hi = mu + sd;   each (token, dimension) is low (h0 <= lo), high (h0 >= hi) or neutral
    margin = relu(h - lo) if low,  relu(hi - h) if high,  relu(h - hi) + relu(lo - h) if neutral
    loss += weight * mean_t ( sum_d margin / number of d with margin > 0 )  +  replay * mean_t -log p(token)

At the base weights every margin is 0; inside its band a state may move freely, unlike under an L2 distance.
Differences from the paper: the margins of a position are divided by the violations of that position, and positions
are averaged; the official code divides by the violations of the whole micro-batch, so that its value depends on how a
step is cut. Its dynamic weight (the term scaled to the cross-entropy) is not offered: it grows without bound as
violations vanish. The paper averages task and replay cross-entropy where both meet; here they are added.
The base is run over the text once; only the class of each entry is kept (2 bits).
Cost: `rows_per_step` texts a step. Combine with: everything. Do not combine with: ProMoT's prompt stage has no rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.engine.ways import LAST
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, State, Term
from holdfast.methods.data._few import in_turn
from holdfast.services import Context, View

TEXT = ("holdfast:general/text.jsonl",)


@dataclass(frozen=True, kw_only=True)
class GeRe(Method):
    """GeRe with the threshold-margin loss (Zhang et al. 2025), arXiv 2508.04676."""

    weight: float = 1.0  # the paper tries 1, 100 and a dynamic one
    replay: float = 1.0  # the paper trains on the text with plain cross-entropy too
    sources: tuple[str, ...] = TEXT  # the paper: 1000 texts of SlimPajama
    pool: int = 64  # ours: texts kept; the paper 1000
    max_tokens: int = 128  # ours; the paper cuts at 563
    rows_per_step: int = 1  # ours: the paper's "BI" puts a fixed number into each batch

    paper: ClassVar = Paper("GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples "
                            "Replay", "2508.04676")  # fmt: skip
    does: ClassVar = "replays general text and holds its hidden states inside the base's bands"
    strengths: ClassVar = ("weight", "replay")
    whole_rows: ClassVar = True

    def off(self) -> bool:
        return (self.weight == 0 and self.replay == 0) or self.rows_per_step == 0

    def check(self, ctx: Context) -> None:
        if min(self.weight, self.replay) < 0 or min(self.pool, self.rows_per_step) < 1 or self.max_tokens < 2:
            what = (
                "GeRe needs weights of at least 0, pool and rows_per_step of at least 1, and max_tokens of at least 2."
            )
            raise PlanError(what, "Mend them.")

    def hidden_layers(self) -> tuple[int, ...]:
        return (LAST,)

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        from holdfast.methods.data.replay import read_sources

        rows = read_sources(self.sources, ctx, owner=self.name, all_tokens=True, most=self.pool)
        most = min(self.max_tokens, ctx.max_length)
        return [r.cut(most) for r in rows]

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        return in_turn(step, self.rows_per_step, pool)

    @torch.no_grad()
    def prepare(self, ctx: Context) -> State:
        """Run the base over the text: the bands, and the class of every entry of every text."""
        rows = self.asides(ctx)
        states = [forward(ctx.model, [row], hidden=True)[1].float() for row in rows]
        joined = torch.cat(states)
        mu, sd = joined.mean(0), joined.std(0, correction=0)
        state: State = {"lo": mu - sd, "hi": mu + sd}
        for row, h in zip(rows, states, strict=True):
            for name, flags in (("low", h <= mu - sd), ("high", h >= mu + sd)):
                state[f"{name}/{_key(row)}"] = torch.from_numpy(np.packbits(flags.cpu().numpy(), axis=-1)).to(h.device)
        return state

    def loss(self, view: View) -> Term | None:
        at = view.positions(self.name)
        if not len(at):
            return None
        h = view.hidden(self.name).float()
        rows = [r for r in view.packed.rows if r.owner == self.name]
        low, high = (torch.cat([_flags(view.state[f"{name}/{_key(r)}"], h) for r in rows]) for name in ("low", "high"))
        value = self.weight * margin(h, view.state["lo"], view.state["hi"], low, high)
        return Term(value - self.replay * view.token_logp[at], self.name)


def margin(h: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """(M,) how far states (M, D) left their bands, mean over the entries that did; low, high: (M, D) bool."""
    outside = torch.where(low, (h - lo).relu(), torch.where(high, (hi - h).relu(), (h - hi).relu() + (lo - h).relu()))
    return outside.sum(-1) / (outside > 0).sum(-1).clamp(min=1)


def _key(row: TokenRow) -> str:
    import hashlib

    return hashlib.sha256(row.key).hexdigest()[:16]


def _flags(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(M, D) bool from packed bits (M, D / 8)."""
    bits = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=-1, count=like.shape[-1]))
    return bits.bool().to(like.device)
