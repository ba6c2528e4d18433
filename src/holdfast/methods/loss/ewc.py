"""EWC: pull weights back to the base, each as hard as the base's answers on general text depend on it.

    loss += (alpha / 2) * sum_j F_j (theta_j - theta0_j)^2
    F_j = mean over rows of general text of (d log p(row) / d theta_j)^2, at the base

labels = "model": the tokens whose log-probability is taken are drawn from the base's own prediction at each position
of the text, which makes F the Fisher information; "data": the text's own tokens, the "empirical" Fisher.
F is divided by its mean over all weights, so that alpha means what it means for L2ToInit (F = 1 everywhere), and cut
at `most` times that: the F of a language model is extremely peaky. Both are ours. F is measured on the untouched base,
one row at a time. With LoRA the change s B A is multiplied out, one module at a time, again in the backward.
AdamW's weight decay pulls to zero instead: leave it at 0. On pre-trained models the comparison of arXiv 2203.17269
found plain L2 better than EWC.
Cost: `rows` forwards and backwards before training; one number for each weight of the base, in checkpoints too; dense:
a copy of the trained weights. LoRA: a product of the size of each weight in every micro-batch.
Combine with: everything at parameter level. Do not combine with: a base in 4 or 8 bits (its weights have no gradient).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.engine.shards import cut_like
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, State, Term, canonical
from holdfast.methods.data.replay import GENERAL, read_sources
from holdfast.methods.loss._weights import changes, wanted
from holdfast.services import Context, View


@dataclass(frozen=True, kw_only=True)
class EWC(Method):
    """Elastic weight consolidation, arXiv 1612.00796; compared with L2 in arXiv 2203.17269."""

    alpha: float = 1e-2  # ours, as L2ToInit's: the papers tune it for each task
    rows: int = 64  # ours: rows of general text that F is measured on
    max_tokens: int = 128  # ours; rows are cut here
    labels: str = "model"  # the Fisher information of the paper's equation
    most: float = 1000.0  # ours: F is cut at so many times its mean
    sources: tuple[str, ...] = GENERAL  # ours
    patterns: tuple[str, ...] = ()  # only names matching one of these; () is all that trains

    paper: ClassVar = Paper("Overcoming catastrophic forgetting in neural networks", "1612.00796",
                            "scaling and cutting of F are ours")  # fmt: skip
    does: ClassVar = "penalises the distance of the weights from the base, by how much general text depends on each"
    strengths: ClassVar = ("alpha",)
    needs: ClassVar = frozenset({"base_weights"})

    def off(self) -> bool:
        return self.alpha == 0

    def check(self, ctx: Context) -> None:
        if self.alpha < 0 or self.most < 1 or self.rows < 1 or self.max_tokens < 2:
            what = "EWC needs alpha of at least 0, rows and most of at least 1, and max_tokens of at least 2."
            raise PlanError(what, "Mend them.")
        if self.labels not in ("model", "data"):
            raise PlanError(f"EWC.labels is {self.labels!r}.", "Use 'model' or 'data'.")
        if not all(_plain(p) for p in ctx.model.parameters()):
            raise PlanError(
                "EWC measures gradients of the base's weights, but the base model is loaded in 4 or 8 bits.",
                "Load it unquantised, or use KLToBase instead of EWC.",
            )

    def prepare(self, ctx: Context) -> State:
        rows = [r.cut(min(self.max_tokens, ctx.max_length)) for r in self._read(ctx)]
        named = ((canonical(n), p) for n, p in ctx.model.named_parameters())
        params = {n: p for n, p in named if wanted(n, self.patterns)}
        found = squared_gradients(ctx.model, params, rows, ctx.seed if self.labels == "model" else None)
        mean = sum(f.sum().item() for f in found.values()) / max(1, sum(f.numel() for f in found.values()))
        return {f"fisher/{n}": f.div_(max(mean, 1e-30)).clamp_(max=self.most) for n, f in found.items()}

    def _read(self, ctx: Context) -> list[TokenRow]:
        return read_sources(self.sources, ctx, owner=self.name, all_tokens=True, most=self.rows)

    def loss(self, view: View) -> Term | None:
        terms = []
        for name, change in changes(view, self.patterns):
            fisher = view.state[f"fisher/{name}"]
            terms.append(checkpoint(_pull, change, fisher, use_reentrant=False))
        return Term(self.alpha / 2 * torch.stack(terms).sum()) if terms else None


def _pull(change: Any, fisher: torch.Tensor) -> torch.Tensor:
    moved = change()
    return (cut_like(fisher.to(moved.device), moved) * moved.square()).sum()


def squared_gradients(
    model: Any, params: Mapping[str, torch.nn.Parameter], rows: Sequence[TokenRow], seed: int | None
) -> dict[str, torch.Tensor]:
    """For each parameter the mean over rows of the squared gradient of a row's log-likelihood, fp32.

    seed: of the tokens drawn from the model's prediction; None takes the rows' own.
    """
    dice = None if seed is None else torch.Generator().manual_seed(seed)
    total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in params.items()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval().requires_grad_(True)
    with torch.enable_grad():
        for row in rows:
            packed, logits = forward(model, [row])
            logp = logits.float().log_softmax(-1)
            target = packed.target if dice is None else _draw(logp, dice)
            said = logp.gather(1, target[:, None]).sum()
            for n, g in zip(params, torch.autograd.grad(said, [*params.values()], allow_unused=True), strict=True):
                if g is not None:
                    total[n] += g.float().square() / len(rows)
    for p, wanted_grad in before:
        p.requires_grad_(wanted_grad)
    model.train(training)
    return total


def _draw(logp: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    """(N,) a token of each position's prediction (N, V); drawn on the CPU, so that every device draws the same."""
    return torch.multinomial(logp.detach().cpu().exp(), 1, generator=dice)[:, 0].to(logp.device)


def _plain(p: torch.Tensor) -> bool:
    return p.is_floating_point() and getattr(p, "quant_state", None) is None
