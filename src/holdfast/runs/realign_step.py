"""The steps of alignment recovery (`runs.realign`): directions, which entries go back, and what they become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.engine.forward import forward_states
from holdfast.engine.pack import TokenRow, token_row
from holdfast.engine.ranks import counted, threshold
from holdfast.engine.ways import blocks
from holdfast.errors import HoldfastError, ModelError
from holdfast.method import layer_of

Tensors = Mapping[str, torch.Tensor]
Rows = Sequence[TokenRow]
Batches = list[list[TokenRow]]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How to recover. layers: K, None for half of the depth; batch: prompts; accumulate: gradients over steps."""

    rate: float = 0.001  # the released code: 0.001 to 0.002 of all parameters a step
    back: float = 0.2
    layers: int | None = None
    steps: int = 20
    warm_up: int = 5
    every: int = 5
    budget: float = 0.05
    batch: int = 16
    accumulate: bool = True
    proved: bool = False

    def check(self, depth: int) -> None:
        """Raises HoldfastError for values that make no sense."""
        shares = all(0 <= x <= 1 for x in (self.rate, self.back, self.budget))
        if not shares or self.steps < 0 or min(self.warm_up, self.every, self.batch) < 1:
            what = f"Alignment recovery was asked for with {self}."
            raise HoldfastError(what, "rate, back and budget lie in 0 to 1, steps at 0 or above, the others at 1.")
        if self.layers is not None and not 1 <= self.layers <= depth:
            what = f"Alignment recovery was asked for the first {self.layers} of {depth} blocks."
            raise HoldfastError(what, f"Use layers from 1 to {depth}.")


def strongest(weights: Tensors, targets: Tensors, grads: Tensors, count: int) -> dict[str, torch.Tensor]:
    """Masks of the entries that lower the loss on their way to `targets` and whose |gradient| lies above that of the
    count-th largest of them; of fewer than that all."""
    agree = {n: (w - targets[n]).sign() * grads[n].sign() > 0 for n, w in weights.items()}
    scores = {n: grads[n].abs() * a for n, a in agree.items()}
    if count < 1:
        return {n: torch.zeros_like(s, dtype=torch.bool) for n, s in scores.items()}
    edge = _ranked(scores, count)
    return {n: s > edge for n, s in scores.items()}


def _ranked(scores: Tensors, count: int) -> float:
    """The count-th largest number of all tensors: the bin it lies in first, so few numbers are sorted."""
    total = sum(s.numel() for s in scores.values())
    count = min(count, total)
    counts = sum(counted(s).cpu() for s in scores.values())
    assert isinstance(counts, torch.Tensor)
    edge = threshold(counts, (count + 0.5) / total)
    reach = torch.cat([s[s >= edge].cpu() for s in scores.values()])
    return float(reach.sort(descending=True).values[count - 1])


@dataclass
class Walk:
    """The model on its way between both ends of the matrices of its first `layers` blocks. total: all parameters of
    the model; harmful, task: batches of prompts and their direction (D,); masks: what is the aligned model's now."""

    model: Any
    how: Recovery
    layers: int
    params: Mapping[str, torch.nn.Parameter]
    tuned: Tensors
    aligned: Tensors
    free: Tensors
    harmful: tuple[Batches, torch.Tensor]
    task: tuple[Batches, torch.Tensor]
    total: int
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    grads: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        model: Any,
        aligned: Any,
        harmful: Sequence[TokenRow],
        task: Sequence[TokenRow],
        how: Recovery,
        spare: Tensors,
    ) -> Walk:
        """Raises ModelError where the two models have other parameters, or packed ones."""
        every, before = dict(model.eval().named_parameters()), dict(aligned.eval().named_parameters())
        if {n: (p.shape, p.dtype) for n, p in every.items()} != {n: (p.shape, p.dtype) for n, p in before.items()}:
            what = "The aligned and the tuned model have parameters of other shapes or precisions."
            raise ModelError(what, "Give the model that was tuned, both loaded alike, adapters merged.")
        layers = how.layers or max(1, len(blocks(model)) // 2)
        first = {str(n) for n in range(layers)}
        params = {n: p for n, p in every.items() if p.ndim > 1 and str(layer_of(n)) in first}
        if not params or not all(p.is_floating_point() for p in params.values()):
            raise ModelError("Alignment recovery finds no plain matrices to put back.", "Use the unquantised model.")
        for n, p in every.items():
            p.requires_grad_(n in params)
        bad, own = (cut(rows, how.batch) for rows in (harmful, task))
        directions = [direction(m, b, layers) for m, b in ((aligned, bad), (model, own))]
        tuned = {n: p.detach().clone() for n, p in params.items()}
        there = {n: before[n].detach().to(p.device) for n, p in params.items()}
        free = {n: ~spare[n].to(p.device) for n, p in params.items() if n in spare}
        ends = (bad, directions[0]), (own, directions[1])
        return cls(model, how, layers, params, tuned, there, free, *ends, sum(p.numel() for p in every.values()))

    def restart(self) -> None:
        """The tuned model again."""
        self.put({n: torch.zeros_like(w, dtype=torch.bool) for n, w in self.tuned.items()})
        self.grads = {}

    @torch.no_grad()
    def put(self, masks: Tensors) -> None:
        self.masks = dict(masks)
        for n, p in self.params.items():
            p.copy_(torch.where(masks[n], self.aligned[n], self.tuned[n]))

    def step(self, rollback: bool) -> None:
        """Put entries back to the aligned model, and with `rollback` some of these to the tuned one."""
        self._look(*self.harmful)
        took = self._towards(self.aligned, self.free, math.ceil(self.total * self.how.rate))
        self.put({n: m | took[n] for n, m in self.masks.items()})
        if rollback:
            self.grads = {}
            self._look(*self.task)
            num = sum(int(m.sum()) for m in took.values())
            given = self._towards(self.tuned, took, math.ceil(self.how.back * num))
            self.put({n: m & ~given[n] for n, m in self.masks.items()})
        if rollback or not self.how.accumulate:
            self.grads = {}

    def _towards(self, targets: Tensors, inside: Tensors, count: int) -> dict[str, torch.Tensor]:
        grads = {n: g * inside[n] if n in inside else g for n, g in self.grads.items()}
        return strongest({n: p.detach() for n, p in self.params.items()}, targets, grads, count)

    def _look(self, prompts: Batches, toward: torch.Tensor) -> None:
        """Add the gradients of -cos over all batches."""
        for some in prompts:
            loss = -_cosine(states(self.model, some, self.layers), toward)
            found = torch.autograd.grad(loss, list(self.params.values()), materialize_grads=True, allow_unused=True)
            for n, g in zip(self.params, found, strict=True):
                self.grads[n] = self.grads.get(n, 0) + g.float()

    @torch.no_grad()
    def cosine(self) -> float:
        """To the harmful direction, mean over batches."""
        prompts, toward = self.harmful
        return sum(float(_cosine(states(self.model, some, self.layers), toward)) for some in prompts) / len(prompts)


def cut(rows: Rows, batch: int) -> Batches:
    """Prompts, each up to the token before its first answer (which stays, as the place where the state is read)."""
    first = [int(r.scored.argmax()) for r in rows]
    prompts = [token_row(r.ids[: n + 1], n) for r, n in zip(rows, first, strict=True)]
    return [prompts[n : n + batch] for n in range(0, len(prompts), batch)]


def states(model: Any, prompts: Rows, layers: int) -> torch.Tensor:
    """(B, D) fp32 states behind block `layers` (from 1) at the last token of prompts of `cut`."""
    return forward_states(model, prompts, (layers - 1,))[2][layers - 1].float()


@torch.no_grad()
def direction(model: Any, prompts: Batches, layers: int) -> torch.Tensor:
    """(D,) mean state of all prompts."""
    return torch.cat([states(model, some, layers) for some in prompts]).mean(0)


def _cosine(some: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(some.mean(0), toward.to(some.device), dim=0)
