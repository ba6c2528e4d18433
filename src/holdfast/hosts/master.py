"""AdamW for weights that the model keeps in bf16 and the optimizer in fp32 (a master copy).

A weight kept in fp32 is cast at every step under autocast, and its gradient cast back. Kept in bf16 it is not, and
nothing else changes: the matrix product reads the same rounded weight, its gradient leaves the product in bf16 either
way, and the moments and the update are fp32. So the numbers are the same, bit for bit, and a weight takes 2 bytes less
(16 with its gradient and moments, where autocast holds its copy through the step). Gradients are widened, and weights
updated and rounded, some at a time: on a CPU while they are in the cache, on CUDA in few launches (not run there).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from holdfast.engine.processes import world
from holdfast.method import Stage
from holdfast.session import Session

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # numbers worked on at once


def may_hold(session: Session, settings: Any, stage: Stage) -> bool:
    """Whether bf16 weights train to the same numbers: nothing reads, adds up or changes weights or gradients."""
    one = settings.gradient_accumulation_steps == 1 and world()[1] == 1 and not (stage.keep_best or settings.keep_best)
    known = next(session.model.parameters()).device.type in CHUNK
    reads = any(
        {"grad", "update", "entries", "steer"} & {*m.sites()} or ("base_weights" in m.needs and "loss" in m.sites())
        for m in session.methods
    )
    wraps = any(m.wraps for m in session.methods)  # an adapter is too small to be worth it
    halves = settings.autocast == torch.bfloat16 and settings.optim == "adamw_torch_fused"
    return one and known and not reads and not wraps and halves


def linear_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights that only plain linear layers read: those that autocast would round."""
    found = {p: m for m in model.modules() if type(m) is torch.nn.Linear for p in (m.weight,) if p.requires_grad}
    for m in model.modules():  # a tied embedding gives what it holds to the whole model
        if type(m) is not torch.nn.Linear:
            for p in m.parameters(recurse=False):
                found.pop(p, None)
    return list(found)


class MasterAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` (fused) with fp32 masters of some weights; the others it updates in place.

    Args:
        groups: as of AdamW; weights in fp32.
        working: the weights to turn into bf16 here; `release` gives them their masters back.
    """

    def __init__(
        self, groups: Any, working: Iterable[torch.nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.master = {p: p.data for p in working}
        self.scale: torch.Tensor | None = None
        self._buffer = torch.empty(0)
        for p, master in self.master.items():
            p.data = master.to(torch.bfloat16)

    @torch.no_grad()
    def clip(self, params: Iterable[torch.nn.Parameter], most: float) -> torch.Tensor:
        """Scale the gradients of the next step as `clip_grad_norm_` would, to the last bit; gives their norm."""
        norms = [n for some in _chunks(params) for n in torch._foreach_norm(self._widened(some))]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.scale = (most / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for params in _chunks(group["params"]):
                self._update(params, group)
        self.scale = None

    def _update(self, params: Sequence[torch.nn.Parameter], group: Mapping[str, Any]) -> None:
        weights, states, grads = [self.master.get(p, p) for p in params], [self.state[p] for p in params], []
        for weight, state in zip(weights, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        grads = self._widened(params)
        if self.scale is not None:
            torch._foreach_mul_(grads, self.scale)
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        adamw(
            weights, grads, *moments, [], [state["step"] for state in states], fused=True, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        rounded = [(p.data, w) for p, w in zip(params, weights, strict=True) if w is not p]
        if rounded:
            torch._foreach_copy_(*map(list, zip(*rounded, strict=True)))

    def _widened(self, params: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Gradients in fp32; what is not is widened in a buffer that is used again, so that it stays in the cache."""
        grads = [p.grad for p in params if p.grad is not None]
        narrow = [g for g in grads if g.dtype != torch.float32]
        sizes = [g.numel() for g in narrow]
        if self._buffer.numel() < sum(sizes):
            self._buffer = torch.empty(sum(sizes), device=narrow[0].device)
        wide = [b.view(g.shape) for b, g in zip(self._buffer[: sum(sizes)].split(sizes), narrow, strict=True)]
        if wide:
            torch._foreach_copy_(wide, narrow)
        left = iter(wide)
        return [g if g.dtype == torch.float32 else next(left) for g in grads]

    def release(self) -> None:
        """Give the model the masters."""
        for p, master in self.master.items():
            p.data = master
        self.master = {}


def _chunks(params: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Those that have a gradient, neighbours together up to the device's CHUNK of numbers."""
    some: list[torch.nn.Parameter] = []
    for p in params:
        if p.grad is None:
            continue
        if some and sum(s.numel() for s in some) + p.numel() > CHUNK.get(p.device.type, 0):
            yield some
            some = []
        some.append(p)
    if some:
        yield some
