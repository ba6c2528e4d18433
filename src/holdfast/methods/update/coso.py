"""CoSO: full weights move inside a small subspace that follows the gradient and stays off what other text needs.

    M (m, h): orthonormal; main directions of the gradients of general text, W (m, n) as the base has it
    every `every` steps:   P (m, r) = the first r left singular vectors of (I - M M^T) G, G the gradient of the step
    each step:   G <- P P^T G;   step <- P P^T step

So M^T (W - W_base) = 0 whatever the optimizer does, weight decay included (GPT-2's turned maps are kept on the input
side so, not on the output side), and W changes by rank r at most between two choices of P. M comes from a sketch by
frequent directions: gradients are appended one after the other to S of `sketch` columns, its squared singular values
lowered by the last one, and the fewest directions that hold `energy` are kept.
Differences from the paper: there M holds directions of earlier tasks and is empty at the first; here it is of general
text, so that it protects the base (ours), and nothing is handed to the next run. Adam runs on the whole matrix and its
step is projected (the paper's Adam runs inside of P, with moments of r n numbers), so memory is that of full tuning,
and moments of directions that P left live on. The paper trains attention's output maps alone, in vision models, with
ranks of 15 to 70 and P anew at every step or every 20th; here all matrices of the layers train, or those that
`patterns` name. Embeddings, head, norms and biases do not.
Cost: some backward passes and SVDs before training, an SVD of every gradient every `every` steps, four thin products a
step. Combine with: every loss and data method. Do not combine with: LoRA.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.engine.base import as_base
from holdfast.engine.forward import forward
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer, canonical
from holdfast.methods.adapt._inputs import general_rows
from holdfast.methods.adapt._matrices import is_matrix
from holdfast.methods.data.replay import GENERAL
from holdfast.services import Context

SMALL = 256  # up to this many rows or columns an SVD is exact, else of as many directions as are asked for


@dataclass(frozen=True, kw_only=True)
class CoSO(Method):
    """Continuous subspace optimization (NeurIPS 2025), arXiv 2505.11816, its projections.

    Raises:
        PlanError: sizes below 1, an energy outside of (0, 1], patterns that no matrix matches.
    """

    rank: int = 50  # the paper's for ImageNet-R
    every: int = 20  # the paper's for DomainNet
    energy: float = 0.98  # the paper
    sketch: int = 100  # the paper's for CIFAR100
    sources: tuple[str, ...] = GENERAL  # ours
    samples: int = 64  # ours: rows of them
    rows_per_gradient: int = 8  # ours
    max_tokens: int = 128  # ours
    patterns: tuple[str, ...] = ()  # of the matrices that train; the paper: attention's output maps

    confined: ClassVar = True
    paper: ClassVar = Paper("Continuous Subspace Optimization for Continual Learning", "2505.11816",
                            "no results for language models; what becomes of its moments when P changes was not "
                            "verified")  # fmt: skip
    does: ClassVar = "takes steps of low rank, outside of the directions that general text needs"
    needs: ClassVar = frozenset({"dense", "gradients"})
    phase: ClassVar = "project"

    def check(self, ctx: Context) -> None:
        if min(self.rank, self.every, self.sketch, self.samples, self.rows_per_gradient) < 1 or self.max_tokens < 2:
            raise PlanError("CoSO needs sizes of at least 1, and max_tokens of at least 2.", "Mend them.")
        if not self.sources:
            raise PlanError(
                "CoSO.sources is empty, so nothing says what is to be kept.", "Name files of general text."
            )
        if not 0 < self.energy <= 1:
            raise PlanError(f"CoSO.energy is {self.energy}.", "Use a part above 0 and at most 1.")
        if not any(self.touches(canonical(n), p) for n, p in ctx.model.named_parameters()):
            raise PlanError(f"CoSO.patterns {list(self.patterns)} match no matrix of a layer.", "Mend them.")

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        for name, p in model.named_parameters():
            if not self.touches(canonical(name), p):
                p.requires_grad_(False)
        return model

    def prepare(self, ctx: Context) -> State:
        """M of every matrix, by its name."""
        params = {canonical(n): p for n, p in ctx.model.named_parameters() if self.touches(canonical(n), p)}
        sketches: State = {}
        with torch.random.fork_rng():  # of all devices, which manual_seed sets
            torch.manual_seed(ctx.seed)
            for gradients in self._gradients(ctx, list(params.values())):
                for name, g in zip(params, gradients, strict=True):
                    sketches[name] = appended(sketches.get(name, g[:, :0]), g, self.sketch)
        return {f"M/{name}": leading(s, self.energy) for name, s in sketches.items()}

    def _gradients(self, ctx: Context, params: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
        """Of the mean loss on some general rows at a time, in fp32, on the untouched base."""
        rows = general_rows(ctx, self.name, self.sources, self.samples, self.max_tokens)
        before = [p.requires_grad for p in params]
        parts = [rows[n : n + self.rows_per_gradient] for n in range(0, len(rows), self.rows_per_gradient)]
        with as_base(ctx.model), torch.enable_grad():
            for p in params:
                p.requires_grad_(True)
            for n, part in enumerate(parts):
                packed, logits = forward(ctx.model, part)
                loss = torch.nn.functional.cross_entropy(logits.float(), packed.target)
                yield [g.float() for g in torch.autograd.grad(loss, params, materialize_grads=True)]
                if ctx.tell:
                    ctx.tell((n + 1) / len(parts), "CoSO: gradients of general text")
            for p, wanted in zip(params, before, strict=True):
                p.requires_grad_(wanted)

    def steer(self, past: Past, state: State) -> Steer | None:
        """Choose P where it is time to, before the gradients of the step are projected."""
        new = [n for n in past.grads if past.step % self.every == 0 or f"P/{n}" not in state]
        if not new:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(past.step)
            return Steer(state={f"P/{n}": self._choose(past.grads[n].float(), state[f"M/{n}"]) for n in new})

    def _choose(self, g: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """(m, r) orthonormal columns outside of M; those without any gradient are 0."""
        u, s = singular(g - m @ (m.T @ g), self.rank)
        return (u - m @ (m.T @ u)) * (s > 1e-5 * s[0].clamp(min=1e-30))

    def grad(self, name: str, grad: torch.Tensor, state: State) -> torch.Tensor:
        return self._inside(name, grad, state)

    def touches(self, name: str, param: torch.Tensor) -> bool:
        return is_matrix(name, param) and (not self.patterns or any(re.search(x, name) for x in self.patterns))

    def update(self, name: str, step: torch.Tensor, param: torch.Tensor, state: State) -> torch.Tensor:
        return self._inside(name, step, state)

    def _inside(self, name: str, change: torch.Tensor, state: State) -> torch.Tensor:
        p = state.get(f"P/{name}")
        return torch.zeros_like(change) if p is None else (p @ (p.T @ change.float())).to(change.dtype)


def singular(a: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first left singular vectors (m, k) and values (k,) of a matrix, k = min(most, m, n)."""
    most = min(most, *a.shape)
    if min(a.shape) > max(SMALL, 2 * most):
        u, s, _ = torch.svd_lowrank(a, q=most, niter=4)
    else:
        u, s, _ = torch.linalg.svd(a, full_matrices=False)
    return u[:, :most], s[:most]


def appended(sketch: torch.Tensor, g: torch.Tensor, size: int) -> torch.Tensor:
    """(m, k) frequent directions of [sketch, g]: at most `size` columns, and one fewer where something was dropped.

    Liberty 2013: squared singular values are lowered by the `size`-th one.
    """
    both = torch.cat([sketch, g], 1)
    u, s = singular(both, size)
    drop = s[-1].square() if len(s) == size < min(both.shape) else 0
    return u * (s.square() - drop).clamp(min=0).sqrt()


def leading(sketch: torch.Tensor, energy: float) -> torch.Tensor:
    """(m, h) orthonormal: the fewest left singular vectors that hold `energy` of the sketch's squares."""
    u, s = singular(sketch, min(sketch.shape))
    held = s.square().cumsum(0)
    count = int((held < energy * held[-1]).sum()) + 1 if held[-1] > 0 else 0
    return u[:, :count].contiguous()
