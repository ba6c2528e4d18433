"""SSF: train a factor, and where the model has a bias a shift, for each channel of what every map and norm gives.

    y' = gamma * y + beta,   gamma = 1 + delta,   delta = beta = 0 at the start
    folded in:  W' = diag(gamma) W,  b' = gamma b + beta;   a norm's weight and bias likewise

A row of a matrix keeps its direction and changes its length alone. A shift could only become a bias, and most language
models have none: beta exists where the original has a bias, elsewhere there is the factor alone.
Differences from the paper: gamma and beta start as 1 and 0 (the official code draws them around these), so step 0 is
the base; what attention itself gives is no module and is not scaled; the head does not train. The paper is about
vision; nothing is known about forgetting.
Cost: one or two numbers a channel, and its output is kept for the factor's gradient. No weight decay: vectors have
none here.
Combine with: data methods, KLToBase, ICLAnchor. Do not combine with: LoRA, what compares weights with the base's.
Export: the factors, for `holdfast.load`; with export.merge a plain model.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from holdfast.engine.replaced import Replaced
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, layer_of
from holdfast.methods.adapt._parts import is_map, with_weight
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class SSF(Method):
    """Scaling and shifting features (NeurIPS 2022), arXiv 2210.08823.

    Raises:
        PlanError: a model without linear maps in its blocks.
    """

    norms: bool = True  # paper: after every operation; False leaves the norms alone

    paper: ClassVar = Paper(
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", "2210.08823"
    )
    does: ClassVar = "trains a factor for each channel of every map and norm, and folds it into the weights"
    wraps: ClassVar = True

    def check(self, ctx: Context) -> None:
        core = inner(ctx.model)
        if not any(_scales(core, name, m) for name, m in core.named_modules()):
            what = f"SSF finds no linear map in the blocks of {type(core).__name__}, so norms alone would train."
            raise PlanError(what, "Use another method.")

    def replace(self, name: str, module: nn.Module, ctx: Context, state: State) -> Replaced | None:
        return Scaled(module) if _scales(ctx.model, name, module) or (self.norms and is_norm(module)) else None

    def merged(self, name: str, module: Replaced) -> nn.Module:
        assert isinstance(module, Scaled)
        return module.folded()


class Scaled(Replaced):
    """A linear map or a norm whose channels are scaled, and shifted where it has a bias."""

    def __init__(self, original: nn.Module):
        super().__init__(original)
        weight, bias = original.weight, getattr(original, "bias", None)
        assert isinstance(weight, torch.Tensor)
        # 1 + delta and not gamma: near 1 a half-precision number would lose what was learnt
        width = weight.shape[-1] if isinstance(original, Conv1D) else len(weight)
        self.delta = nn.Parameter(torch.zeros(width, dtype=weight.dtype, device=weight.device))
        self.shift = None if bias is None else nn.Parameter(torch.zeros_like(self.delta))

    def changed(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(*args, **kwargs)
        scaled = y * (1 + self.delta.float())
        return (scaled if self.shift is None else scaled + self.shift).to(y.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The plain module that computes the same."""
        original, gamma = self.base_layer, 1 + self.delta.float()
        bias = None if self.shift is None else gamma * original.bias.float() + self.shift.float()
        if isinstance(original, nn.Linear):
            return with_weight(original, gamma[:, None] * original.weight.float(), bias)
        plain = copy.deepcopy(original)
        one = 0.0 if isinstance(original, Conv1D) else float(adds_one(original))  # Conv1D's channels are last, too
        plain.weight.copy_(gamma * (original.weight.float() + one) - one)
        if bias is not None:
            plain.bias.copy_(bias)
        return plain


def _scales(model: Any, name: str, module: nn.Module) -> bool:
    """Whether a module is a linear map of a block, GPT-2's turned ones too."""
    turned = isinstance(module, Conv1D) and layer_of(f"{name}.weight") is not None
    return turned or is_map(model, name, module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight, that reads one tensor."""
    weight: Any = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or weight is None or weight.ndim != 1:
        return False
    try:
        return _ramp(module).shape == weight.shape
    except TypeError:  # it wants a gate as well
        return False


@torch.no_grad()
def adds_one(norm: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight, as Gemma's do, and not by its weight."""
    bare = copy.deepcopy(norm)
    for p in bare.parameters():
        p.zero_()
    return bool(_ramp(bare).any())


@torch.no_grad()
def _ramp(norm: Any) -> torch.Tensor:
    """(d,) what a norm gives for numbers that are not all the same."""
    return norm(torch.linspace(1, 2, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)[None])[0]
