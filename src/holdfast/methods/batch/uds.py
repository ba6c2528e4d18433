"""UDS: of each drawn batch train on the rows that are worth most: large answers of the model, unlike recent ones.

    score_i = ||Z_i||_* + alpha * mean_{q in queue} ||P(Z_i) - q||_2

Z_i: (L, V) logits of the model so far at the answer's L tokens. ||.||_*: the sum of its singular values. P: a fixed
random projection to `dims` numbers: random signs, the real part of an FFT and some of its entries, along the
vocabulary and then along the `max_length` positions on which the answer is laid. Scaled as in the released code, it
makes distances sqrt(V max_length) / 2 times as long, and alpha is a weight of those. queue: the projections of the
rows chosen last; while it is empty the second part is 0. The best `keep` of each batch are trained on, the others are
not used. keep 1 is plain fine-tuning.
Differences: the released code takes every position of a padded row, prompt and padding too, which favours long rows;
here the answer alone counts. It draws the FFT's entries with replacement, here none comes twice. The choice is among
the rows of a whole step, there among those of a process's micro-batch. Singular values come from the product of the
logits with themselves in fp64: the same numbers, cheaper.
Cost: one more forward of every drawn row. Nothing in it protects what the model knows but that fewer rows move it.
Combine with: every adapt, loss and token_weight method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context, Look


@dataclass(frozen=True, kw_only=True)
class UDS(Method):
    """Utility-diversity sampling, arXiv 2510.16882."""

    keep: float = 0.25  # released scripts: one row of a micro-batch of four
    alpha: float = 2.5e-3  # released code, for its projection's scale
    queue: int = 1024  # released code, in rows
    dims: tuple[int, ...] = (128, 8)  # released code: entries kept along the vocabulary and along the answer

    paper: ClassVar = Paper("Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning",
                            "2510.16882", "read in summaries and in the released code")  # fmt: skip
    does: ClassVar = "trains on the rows of a batch that the model answers most strongly and least alike"
    needs: ClassVar = frozenset({"live_logits"})

    def off(self) -> bool:
        return self.keep == 1

    def check(self, ctx: Context) -> None:
        if not 0 < self.keep <= 1:
            raise PlanError(f"UDS.keep is {self.keep}.", "Use a share of the batch, above 0 and at most 1.")
        if self.alpha < 0:
            raise PlanError(f"UDS.alpha is {self.alpha}.", "Use 0 or more.")
        if self.queue < 1:
            raise PlanError(f"UDS.queue is {self.queue}, and diversity needs rows to differ from.", "Use 1 or more.")
        if len(self.dims) != 2 or min(self.dims) < 1:
            raise PlanError(f"UDS.dims is {self.dims}.", "Give two whole numbers above 0, such as [128, 8].")

    def batch(self, rows: Sequence[TokenRow], step: int, look: Look) -> Sequence[TokenRow]:
        mine = [i for i, r in enumerate(rows) if r.owner == "task"]
        most = math.ceil(self.keep * len(mine))
        if most == len(mine):
            return rows
        both = [(self.project(z, look.ctx), nuclear_norm(z)) for z in look.logits([rows[i] for i in mine])]
        seen, norms = map(torch.stack, zip(*both, strict=True))  # (B, dims), (B,)
        queue = look.state.get("queue", seen[:0])
        apart = torch.cdist(seen, queue).mean(1) if len(queue) else seen.new_zeros(len(seen))
        score = norms + self.alpha * apart.double()
        best = sorted(score.argsort(descending=True, stable=True)[:most].tolist())
        look.state["queue"] = torch.cat([queue, seen[best]])[-self.queue :]
        chosen = {mine[i] for i in best}
        return [r for i, r in enumerate(rows) if r.owner != "task" or i in chosen]

    def project(self, logits: torch.Tensor, ctx: Context) -> torch.Tensor:
        """(dims[0] * dims[1],) fixed random projection of (L, V) logits."""
        grid = _mixed(logits.float(), self.dims[0], ctx.seed)  # (L, d0)
        whole = grid.new_zeros((max(ctx.max_length, self.dims[1]), grid.shape[1]))
        whole[: len(grid)] = grid
        return _mixed(whole.T, self.dims[1], ctx.seed + 1).flatten()


def nuclear_norm(z: torch.Tensor) -> torch.Tensor:
    """Sum of the singular values of (L, V), in fp64, from its product with itself along the longer side."""
    z = z.double()
    product = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()


def _mixed(x: torch.Tensor, entries: int, seed: int) -> torch.Tensor:
    """(n, entries) of (n, m): random signs, the real part of an FFT, some entries.

    Scaled as released: the FFT is not normalised and its real part is half of it, so lengths grow by sqrt(m / 2).
    """
    dice = torch.Generator().manual_seed(seed)
    m = x.shape[-1]
    signs = (torch.randint(0, 2, (m,), generator=dice) * 2 - 1).to(x.device)
    picked = torch.randperm(m, generator=dice)[:entries].to(x.device)
    return torch.fft.fft(x * signs).real[..., picked] * math.sqrt(m / len(picked))
