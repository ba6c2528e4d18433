"""Skill localisation with a trained mask: which few changes of a tuned model carry the task?

    theta(g) = theta_0 + g tau,   tau = theta_tuned - theta_0
    g = b + (1 - 2 b) sigmoid(S - c);   b = 1 on the largest |tau| (`SkillGraft`), S uniform in [0, 1) at first
    dL/dS = (1 - 2 b) (dL/dtheta * tau) s (1 - s),   s = sigmoid(S - c);   S <- S - lr * its mean over the rows
    after each step g is rounded at 0.5 and its loss taken; the best rounded g is the result, step 0 among them

Panigrahi et al., ICML 2023 (arXiv 2302.06600), after their code: plain SGD at a huge rate (s (1 - s) is about e^-c),
all rows in one step, embeddings and head untouched. Differences: the best g is the one of the lowest loss on the rows
given (theirs: accuracy on training and validation rows); c is ours, its value was not read. A step may add entries to
the patch or take some out: the number that came out is returned.

Cost: base, change and S in memory, a forward and backward over the rows and one forward more at each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast import models
from holdfast.data.rows import read_rows
from holdfast.data.tokens import tokenize_all
from holdfast.engine.base import batches
from holdfast.engine.forward import forward
from holdfast.engine.pack import TokenRow
from holdfast.engine.ranks import counted, within
from holdfast.errors import HoldfastError, ModelError
from holdfast.methods.merge.skill_graft import SkillGraft

STEPS, RATE, BIAS = 10, 1e7, 10.0  # the released code; the released code; ours
BATCH_TOKENS = 1024
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Graft:
    """masks: which entries come from the tuned model, by name; losses: of the rounded grafts, nats a token, the
    largest changes alone first."""

    masks: Tensors
    losses: list[float]

    @property
    def share(self) -> float:
        """Part of the entries that may be grafted."""
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())


def graft(
    base: str, tuned: str, data: str | Path, out: Path, *, share: float = 1e-4, max_tokens: int = 1024, **settings: Any
) -> Graft:
    """Write the base with the trained graft into the folder `out`, as a plain model.

    Args:
        base, tuned: hub ids, folders or an adapter on the base.
        data: rows of the task, any file that `data.train` takes.
        settings: of `train`: steps, rate, bias, seed.

    Raises:
        HoldfastError: the models have other parameters, values that make no sense, no rows.
    """
    how: dict[str, Any] = {"dtype": "float32", "merge_adapter": True}
    model, tokenizer = models.load(base, **how)
    after = {n: p.detach() for n, p in models.load(tuned, **how)[0].named_parameters()}
    rows = tokenize_all(read_rows(data, base_dir=Path.cwd(), tokenizer=tokenizer), tokenizer, max_tokens)
    found = train(model, after, rows, share=share, **settings)
    card = f"# A graft\n\n{found.share:.3g} of the entries of {tuned}, put onto {base}.\n"
    models.save_model(model, tokenizer, out, card=card)
    return found


def train(
    model: Any,
    tuned: Tensors,
    rows: Sequence[TokenRow],
    *,
    share: float = 1e-4,
    steps: int = STEPS,
    rate: float = RATE,
    bias: float = BIAS,
    seed: int = 0,
) -> Graft:
    """Find the graft on the base `model`, which becomes the grafted model; `tuned`: parameters by name, fp32 both.

    Raises:
        HoldfastError: as `graft`.
    """
    if not 0 < share < 1 or steps < 0 or not rate > 0 or not rows:
        what = f"A graft was asked for with a share of {share}, {steps} steps, a rate of {rate} and {len(rows)} rows."
        raise HoldfastError(what, "Use a share inside (0, 1), steps of at least 0, a rate above 0, and rows.")
    at = _Work.begin(model, tuned, SkillGraft(share=share), rows)
    patch, own = patch_of(at.taus, share), torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(w.shape, generator=own).to(w.device) for n, w in at.start.items()}
    best, losses = patch, [at.loss(patch)]
    for _ in range(steps):
        gates = {n: torch.sigmoid(s - bias) for n, s in scores.items()}
        grads = at.gradients({n: soft(patch[n], s) for n, s in gates.items()})
        for n, s in gates.items():
            scores[n] -= rate * score_gradient(patch[n], s, grads[n], at.taus[n])
        rounded = {n: soft(patch[n], torch.sigmoid(s - bias)) > 0.5 for n, s in scores.items()}
        losses.append(at.loss(rounded))
        best = rounded if losses[-1] < min(losses[:-1]) else best
    at.put(best)
    model.requires_grad_(False)
    return Graft(best, losses)


def patch_of(taus: Tensors, share: float) -> dict[str, torch.Tensor]:
    """b: the largest changes of all tensors together, at most `share` of the entries; bool."""
    counts = sum(counted(t) for t in taus.values())
    assert isinstance(counts, torch.Tensor)
    edge = within(counts, share)
    return {n: t.abs() >= edge for n, t in taus.items()}


def soft(patch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """g = b + (1 - 2 b) s."""
    b = patch.to(gate.dtype)
    return b + (1 - 2 * b) * gate


def score_gradient(patch: torch.Tensor, gate: torch.Tensor, grad: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """dL/dS of dL/dtheta."""
    return (1 - 2 * patch.to(gate.dtype)) * (grad * tau) * gate * (1 - gate)


@dataclass(frozen=True)
class _Work:
    """A base that grafts are put onto: its parameters, where those that are grafted began, and their changes."""

    model: Any
    params: Mapping[str, torch.nn.Parameter]
    start: Tensors
    taus: Tensors
    rows: Sequence[TokenRow]

    @classmethod
    def begin(cls, model: Any, tuned: Tensors, rule: SkillGraft, rows: Sequence[TokenRow]) -> _Work:
        params = dict(model.named_parameters())
        if {n: p.shape for n, p in params.items()} != {n: t.shape for n, t in tuned.items()}:
            raise ModelError("Base and tuned model have other parameters.", "Give the base that was tuned.")
        start = {n: p.detach().clone() for n, p in params.items() if rule.takes(n, p.ndim)}
        for n, p in params.items():
            p.requires_grad_(n in start)
        return cls(model, params, start, {n: tuned[n].to(w.device) - w for n, w in start.items()}, rows)

    @torch.no_grad()
    def put(self, gates: Tensors) -> None:
        for n, g in gates.items():
            self.params[n].copy_(self.start[n] + g * self.taus[n])

    @property
    def _tokens(self) -> int:
        return sum(r.num_scored for r in self.rows)

    @torch.no_grad()
    def loss(self, gates: Tensors) -> float:
        """Of a graft, nats a token."""
        self.put(gates)
        return sum(float(self._sum(some)) for _, some in batches(self.rows, BATCH_TOKENS)) / self._tokens

    def gradients(self, gates: Tensors) -> dict[str, torch.Tensor]:
        """Of the mean loss a token, for what is grafted."""
        self.put(gates)
        for _, some in batches(self.rows, BATCH_TOKENS):
            (self._sum(some) / self._tokens).backward()
        found = {n: torch.zeros_like(self.taus[n]) if p.grad is None else p.grad for n, p in self._grafted()}
        for p in self.params.values():
            p.grad = None
        return found

    def _grafted(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, self.params[n]) for n in self.start]

    def _sum(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        """Summed cross-entropy of the answers of some rows."""
        packed, logits = forward(self.model, rows)
        return torch.nn.functional.cross_entropy(logits.float(), packed.target, reduction="sum")
