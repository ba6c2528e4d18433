"""CoBa: sources that learn more slowly weigh more; when some begin to get worse, those that still learn do.

    l_k(t) = loss of source k on held-out rows / the first such loss;  l_max(t) = max_k l_k(t)
    a_k(t), a_max(t) = slopes of straight lines through the last `history` points of l_k, l_max
    RCS = softmax_k(K a_k / sum_k |a_k|)                       K sources
    ACS = softmax_k(-N a_k(t) / sum_t |a_k(t)|)                N slopes of the last `history` looks
    DF  = n softmax_t(-n tau a_max(t) / sum_t |a_max(t)|)[now]  n slopes since the warm-up
    w   = softmax_k(K (DF RCS + (1 - DF) ACS));  if one is below 1 / (10 K):  w <- 0.9 w + 1 / (10 K)

Until `warmup` steps all sources weigh the same. A source's token losses are weighted by w_k / sum_j part_j w_j, with
part_k what source k has of the mix's scored tokens: the weight of a token is 1 on average. Where a source of the mix
is streamed, parts are not known and count as equal. Sources are those of the mix: the task and what other methods add
to it, such as Replay; `share` adds general text that CoBa brings itself. Of every source a part `cut`, chosen by
content, never trains: those are the rows that are scored.
Differences from the paper: it divides the loss of each source by the source's own tokens, here all tokens of the step
are divided by their number, so a large source keeps its size (MFTCoder beside it gives the paper's division, with the
whole task's loss 1 / (K sum_j part_j w_j) times the paper's); the same rows are scored at every look instead of one
batch after another.
Cost: one forward of `rows` rows of each source every `every` steps. Combine with: everything; several sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.data.mix import Mix
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer
from holdfast.methods.steer._sources import looked_at, weighing_one, with_text
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class CoBa(Method):
    """Convergence balancer of multi-task losses (EMNLP 2024)."""

    warmup: int = 100  # official code, in steps
    history: int = 200  # official code, in looks
    every: int = 1  # official code, in steps
    tau: float = 5.0  # official code
    rows: int = 16  # ours: of each source; the official code takes a batch
    cut: float = 0.1  # ours: part of the rows that never trains
    share: float = 0.0  # ours: part of the mix that is general text of its own
    sources: tuple[str, ...] = ("holdfast:general/instructions.jsonl",)  # ours: that text

    paper: ClassVar = Paper("CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models",
                            note="its id was not checked; formulas from the official code, MFTCoder")  # fmt: skip
    does: ClassVar = "weights the sources of the data by how fast each still learns"

    def off(self) -> bool:
        return self.cut == 0 and self.share == 0

    def check(self, ctx: Context) -> None:
        if self.warmup < 1 or self.history < 2 or self.every < 1 or self.rows < 1 or self.tau < 0:
            what = "CoBa needs warmup, every and rows of at least 1, history of at least 2, and tau of at least 0."
            raise PlanError(what, "Mend them.")
        if not 0 < self.cut < 1 or not 0 <= self.share < 1:
            raise PlanError("CoBa needs cut above 0 and below 1, and share of 0 or more and below 1.", "Mend them.")

    def prepare(self, ctx: Context) -> State:
        if 0 < ctx.total_steps <= self.warmup:
            what = f"CoBa weights nothing for {self.warmup} steps; in a run of {ctx.total_steps} it never would."
            raise PlanError(what, "Lower CoBa.warmup, or take it out of the plan.")
        return {}

    def data(self, mix: Mix, ctx: Context) -> Mix:
        return with_text(mix, ctx, self.name, self.sources, self.share).hold_out(self.cut)

    def held_out(self, mix: Mix, ctx: Context) -> Mapping[str, Sequence[TokenRow]]:
        return looked_at(mix, ctx, self.name, self.rows, "balances")

    def looks(self, step: int) -> bool:
        return step % self.every == 0

    def steer(self, past: Past, state: State) -> Steer | None:
        names = sorted(past.held_out) or sorted(n.removeprefix("weight/") for n in state if n.startswith("weight/"))
        if not names:
            return None
        kept = self._look(past, names, state) if past.held_out else state
        if f"weight/{names[0]}" not in kept:
            return Steer(state=kept)
        return Steer(source_weight={n: float(kept[f"weight/{n}"]) for n in names}, state=kept)

    def _look(self, past: Past, names: Sequence[str], state: State) -> State:
        """The state after a look: losses of each source, slopes since the warm-up, weights."""
        seen = torch.tensor([past.held_out[n] for n in names], dtype=torch.float64)
        losses = torch.cat([state["losses"].cpu(), seen[:, None]], 1) if "losses" in state else seen[:, None]
        kept: State = {"losses": losses}
        if past.step < self.warmup or losses.shape[1] < 2:
            return kept
        relative = (losses / losses[:, :1])[:, -self.history :]
        now = slopes(torch.cat([relative, relative.max(0).values[None]]))[:, None]  # (K + 1, 1)
        kept["slopes"] = torch.cat([state["slopes"].cpu(), now], 1) if "slopes" in state else now
        own, worst = kept["slopes"][:-1, -self.history :], kept["slopes"][-1]
        weights = weighing_one(balance(own, worst, self.tau), names, past.parts)
        return kept | {f"weight/{n}": w for n, w in zip(names, weights, strict=True)}


def slopes(y: torch.Tensor) -> torch.Tensor:
    """(K,) slopes of the straight lines of least squares through y (K, n) at 0, 1, ..., n - 1; n >= 2."""
    x = torch.arange(y.shape[1], dtype=y.dtype)
    x = x - x.mean()
    return (y @ x) / (x @ x)


def balance(own: torch.Tensor, worst: torch.Tensor, tau: float) -> torch.Tensor:
    """(K,) weights that add up to 1, from slopes of the sources (K, N) and of the worst of them (n,)."""
    k, now = len(own), own[:, -1]
    relative = (k * _parts(now, 0)).softmax(0)
    absolute = (-own.shape[1] * _parts(own, 1)[:, -1]).softmax(0)
    divergence = len(worst) * (-len(worst) * tau * _parts(worst, 0)).softmax(0)[-1]
    weights = (k * (divergence * relative + (1 - divergence) * absolute)).softmax(0)
    least = 1 / (10 * k)
    return weights * (1 - k * least) + least if bool((weights < least).any()) else weights


def _parts(slopes: torch.Tensor, dim: int) -> torch.Tensor:
    """Slopes divided by the sum of their sizes along `dim`."""
    return slopes / slopes.abs().sum(dim, keepdim=True).clamp(min=1e-300)
