"""GOTD (experimental): of a pool of texts mix in those that pull it fastest towards the target, by optimal transport.

    f, g = dual potentials of the entropic transport from the pool to the target, both of uniform mass
    s_i = f_i - mean_{j != i} f_j,   the `select` texts with the lowest s_i are a source of the mix

Cost of transport: 1 - cosine of the base's mean last hidden states. A light training sees what the base was trained on
and the new texts together. So what is wanted are not texts like the target, but those that the pool has too few of to
match it: the gradient of the transport's cost with respect to each text's mass says which.
Target: the task's own rows, or the files `target` (general text, for what should be kept). Neither may be what the
result is measured on. Pool: the files `sources`.
Differences: the paper trains on the chosen texts first and on the task afterwards; here they are `share` of the mix.
It embeds with a sentence encoder. The calibration (s_i) is cited there from another work and was read in a summary
alone, hence experimental.
Cost: one forward of the base over pool and target, and their transport, before training.
Combine with: everything. It is Replay with chosen texts: beside Replay it chooses from the same shipped set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.data.mix import Mix, Source
from holdfast.engine.base import batches
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow, token_row
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.data._few import few
from holdfast.methods.data.replay import GENERAL, read_sources
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class GOTD(Method):
    """Gradients of optimal transport (Kang et al., ICLR 2024), arXiv 2405.02774."""

    sources: tuple[str, ...] = GENERAL  # ours: the pool
    target: tuple[str, ...] = ()  # files; () is the task's rows, as in the paper
    select: int = 64  # ours: texts that are chosen
    share: float = 0.1  # ours: of the mix
    pool: int = 2000  # ours: most texts that are looked at, of the pool and of the target
    max_tokens: int = 128  # ours: longer texts are cut
    blur: float = 0.05  # ours: of the median cost

    paper: ClassVar = Paper("Get more for less: Principled Data Selection for Warming Up Fine-Tuning in LLMs",
                            "2405.02774", "the calibration of potentials was read in a summary")  # fmt: skip
    does: ClassVar = (
        "mixes in the texts that pull the pool fastest towards the target, by optimal transport (experimental)"
    )
    strengths: ClassVar = ("share",)
    odds: ClassVar = strengths

    def off(self) -> bool:
        return self.share == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.share < 1 or self.blur <= 0:
            raise PlanError("GOTD needs share of 0 or more and below 1, and blur above 0.", "Mend them.")
        if min(self.select, self.pool) < 1 or self.max_tokens < 2:
            raise PlanError("GOTD needs select and pool of at least 1, and max_tokens of 2.", "Mend them.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        most = min(self.max_tokens, ctx.max_length)
        read = read_sources(self.sources, ctx, owner="task", source=self.name, most=self.pool)
        texts = [r for r in (row.cut(most) for row in read) if r.scored.any()]
        aims = few(mix.kept, self.pool, self.name, ctx)
        if self.target:
            aims = read_sources(self.target, ctx, owner="task", most=self.pool)
        if len(texts) < self.select:
            what = f"GOTD chooses {self.select} texts, but its pool has {len(texts)}."
            raise PlanError(what, "Lower GOTD.select, or give more GOTD.sources.")
        pool, target = (embed(ctx.model, [r.cut(most) for r in rows]) for rows in (texts, aims))
        score = gradients(1 - pool @ target.T, self.blur)
        best = sorted(score.argsort(stable=True)[: self.select].tolist())
        return mix.add(Source(self.name, [texts[i] for i in best], self.share))


@torch.no_grad()
def embed(model: Any, rows: Sequence[TokenRow]) -> torch.Tensor:
    """(n, D) of length 1, fp64 on the CPU: the mean of the last hidden states of each row, but for its last token."""
    out = []
    for _, batch in batches([token_row(r.ids, 1) for r in rows], 1024):
        packed, states = forward(model, batch, hidden=True)
        parts = states.double().cpu().split([r.num_scored for r in packed.rows])
        out += [part.mean(0) for part in parts]
    return torch.nn.functional.normalize(torch.stack(out), dim=-1)


def gradients(cost: torch.Tensor, blur: float, tolerance: float = 1e-3, most: int = 2000) -> torch.Tensor:
    """(n,) how the transport's cost changes with the mass of each of n texts, from costs (n, m), up to a constant.

    Sinkhorn in the log domain, with uniform masses, until the masses are met within `tolerance` (their sum is 1).
    """
    n, m = cost.shape
    step = blur * cost.median().clamp(min=1e-9)
    f, g = cost.new_zeros(n), cost.new_zeros(m)
    for _ in range(most):
        g = -step * ((f[:, None] - cost) / step).logsumexp(0) - step * torch.log(cost.new_tensor(float(m)))
        meets = ((f[:, None] + g[None] - cost) / step).logsumexp(1).exp()
        f = -step * ((g[None] - cost) / step).logsumexp(1) - step * torch.log(cost.new_tensor(float(n)))
        if float((meets - 1 / n).abs().sum()) < tolerance:
            break
    return f - (f.sum() - f) / max(1, n - 1)
