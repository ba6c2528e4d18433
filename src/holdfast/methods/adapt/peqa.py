"""PEQA: round the weights to a few bits, and train the scales of the rounded integers alone.

    Q = clamp(round(W / s0) + z, 0, 2^bits - 1) - z,   s0 = (max - min) / (2^bits - 1) and z for each row, or group
    W' = (s0 + ds) * Q,   ds = 0 at the start, the only thing that trains

So the change is diag(ds / s0) times the rounded base: with one scale a row no row can turn, and what was tuned is a
vector for each matrix. Step 0 is the rounded base and not the base, and rounding alone costs some of what the model
knows. Switched off the model is the unrounded base, to the last bit: reports compare with that, and a KL to it also
mends the rounding. Every linear map of the blocks is rounded; embeddings, head and norms stay.
Differences from the paper: the integers are multiplied out at every step, so nothing is saved but optimizer state, and
the unrounded base stays beside them (no integer kernels); the range of a row always holds 0.
ds moves by the learning rate itself and scales are small: rates as of full tuning, not of adapters. A scale that would
fall to 0 is held at a hundredth of its start. Cost: one byte a weight beside the base, multiplied out at every use.
Combine with: KLToBase, ICLAnchor, data methods. Do not combine with: LoRA, what compares weights with the base's.
Export: the scales' changes, for `holdfast.load`, which rounds its base again (load it in the type it was trained in);
with export.merge a plain model whose weights are the rounded ones, in the base's type.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from holdfast.engine.replaced import Replaced
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.adapt._parts import is_map, with_weight
from holdfast.services import Context, State

LEAST = 0.01  # of a scale, in parts of what it began with
TINY = 1e-8  # a scale of zeros
NEAR = 2.0**-8  # about a scale: in fp16 sums over bare integers would overflow; a power of 2 rounds nothing


@dataclass(frozen=True, kw_only=True)
class PEQA(Method):
    """Parameter-efficient and quantisation-aware adaptation (NeurIPS 2023), arXiv 2305.14152.

    Raises:
        PlanError: bits outside of 2 to 7, or a group that does not divide the width of a map.
    """

    bits: int = 4  # paper: 3 or 4
    group_size: int = 0  # paper: 0 is one scale a row; 256, 128 or 64 numbers for quality

    paper: ClassVar = Paper(
        "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization",
        "2305.14152",
        note="no official code was found",
    )
    does: ClassVar = "rounds the weights to a few bits and trains the scales alone"
    wraps: ClassVar = True
    copies: ClassVar = True

    def check(self, ctx: Context) -> None:
        if not 2 <= self.bits <= 7:
            raise PlanError(f"PEQA.bits is {self.bits}.", "Use 2 to 7; the paper uses 3 or 4.")
        if self.group_size < 0:
            raise PlanError(f"PEQA.group_size is {self.group_size}.", "Use 0 for one scale a row.")
        for name, module in inner(ctx.model).named_modules() if self.group_size else ():
            if is_map(ctx.model, name, module) and module.in_features % self.group_size:
                what = f"PEQA.group_size is {self.group_size}, but {name} has rows of {module.in_features} numbers."
                raise PlanError(what, "Use a size that divides all widths, or 0 for one scale a row.")

    def replace(self, name: str, module: nn.Module, ctx: Context, state: State) -> Replaced | None:
        return Rounded(module, self.bits, self.group_size) if is_map(ctx.model, name, module) else None

    def merged(self, name: str, module: Replaced) -> nn.Module:
        assert isinstance(module, Rounded)
        return with_weight(module.base_layer, module.weight().float())


class Rounded(Replaced):
    """A linear map on integers with trained scales.

    Args:
        group: numbers of a row that share a scale; 0: all of them.
    """

    def __init__(self, original: nn.Module, bits: int, group: int):
        super().__init__(original)
        assert isinstance(original, nn.Linear)
        ints, scale = rounded(original.weight.detach().float(), bits, group)
        self.register_buffer("ints", ints, persistent=False)  # (m, n) int8
        self.register_buffer("scale", scale, persistent=False)  # (m, groups) fp32, at the start
        self.change = nn.Parameter(torch.zeros(scale.numel(), dtype=original.weight.dtype, device=scale.device))

    def scales(self) -> torch.Tensor:
        """(m, groups) as they are now."""
        return torch.maximum(self.scale + self.change.float().view_as(self.scale), LEAST * self.scale)

    def weight(self) -> torch.Tensor:
        """(m, n) multiplied out."""
        return multiplied(self.ints, self.scales())

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        bias, scales, dtype = self.base_layer.bias, self.scales(), self.base_layer.weight.dtype
        if scales.shape[1] > 1:
            y = _Grouped.apply(x, self.ints, scales, dtype)
            return y if bias is None else y + bias.to(y.dtype)
        y = _Shared.apply(x, self.ints, dtype)
        scaled = y * (scales[:, 0] / NEAR)  # what the gradient of the scales needs is y alone
        return (scaled if bias is None else scaled + bias).to(y.dtype)


class _Shared(torch.autograd.Function):
    """x (..., n) times NEAR times the integers; the backward multiplies them out again, and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ints: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(ints)
        ctx.dtype = x.dtype
        return linear(x, ints.to(dtype).mul_(NEAR))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,), (ints,) = grads, ctx.saved_tensors
        return (grad @ ints.to(grad.dtype).mul_(NEAR)).to(ctx.dtype), None, None


class _Grouped(torch.autograd.Function):
    """x (..., n) times the weight; the backward multiplies it out again, and keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ints: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, ints, scales)
        ctx.dtype = dtype
        return linear(x, multiplied(ints, scales).to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        (grad,), (x, ints, scales) = grads, ctx.saved_tensors
        weight = multiplied(ints, scales).to(ctx.dtype).to(grad.dtype)
        by_weight = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
        by_scale = (by_weight.float().view(*scales.shape, -1) * ints.view(*scales.shape, -1)).sum(-1)
        return (grad @ weight).to(x.dtype), None, by_scale, None


def multiplied(ints: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(m, n) integers times the scales (m, groups) of their groups."""
    return (ints.view(*scales.shape, -1) * scales[..., None]).view_as(ints)


def rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """((m, n) int8, (m, groups) scales) of asymmetric rounding to nearest."""
    m, n = weight.shape
    groups = weight.view(m, n // (group or n), -1)
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(TINY)
    zero = (-low / scale).round()
    ints = ((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero
    return ints.view(m, n).to(torch.int8), scale[..., 0]
