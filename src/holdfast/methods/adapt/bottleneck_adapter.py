"""Bottleneck adapters: small nets of two layers behind, or beside, the parts of every block; the rest is frozen.

    g(h) = U f(D h + b_d) + b_u,   D (k, d), U (d, k),   k = d / reduction_factor,   U = b_u = 0 at the start
    houlsby:   h = part(x) + g(part(x))   for attention and for the feed-forward net
    pfeiffer:  the same for the feed-forward net alone
    parallel:  h = FFN(x) + scale g(x)

g is not linear, so it cannot be merged: `holdfast.load` loads what is exported. Step 0 is the base.
Differences from the papers: decoders here add the part's output to the stream after it, so g stands before that sum,
and before the norm that some models have there (BLOOM's parts add the stream themselves: there g is behind it); the
papers also train the norms. Ids and the tables of the papers were not checked. Active adapters forget as LoRA does:
what protects is the data and the terms beside them.
Cost: (2 d k + d + k) numbers and 2 d k products a token at each place, in training and after it.
Combine with: data methods, KLToBase, ICLAnchor. Do not combine with: LoRA, what compares weights with the base's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from holdfast.engine.replaced import Replaced
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.adapt._bottleneck import (
    ACTIVATIONS,
    Bottleneck,
    first_of,
    size_for,
    states_of,
    sublayer_of,
    width_of,
    with_states,
)
from holdfast.services import Context, State

FORMS = {"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",), "parallel": ("feed-forward",)}


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(Method):
    """Adapters (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2005.00247; He et al. 2110.04366).

    Raises:
        PlanError: an unknown form or activation, a reduction below 1, or a model whose blocks have no such parts.
    """

    form: str = "houlsby"  # or pfeiffer, parallel
    reduction_factor: float = 16.0  # usual: k = d / 16
    activation: str = "relu"  # or gelu, silu
    scale: float = 1.0  # of the parallel form; ours

    paper: ClassVar = Paper(
        "Parameter-Efficient Transfer Learning for NLP", "1902.00751", note="ids and tables are from memory"
    )
    does: ClassVar = "trains small two-layer nets behind or beside the parts of every block"
    wraps: ClassVar = True

    def check(self, ctx: Context) -> None:
        for wrong, what in (
            (self.form not in FORMS, f"form is {self.form!r}, but it is {', '.join(FORMS)}"),
            (self.activation not in ACTIVATIONS, f"activation is {self.activation!r}, not {', '.join(ACTIVATIONS)}"),
            (self.reduction_factor < 1, f"reduction_factor is {self.reduction_factor}, but it is at least 1"),
            (self.scale == 0, "scale is 0, so that nothing is added"),
        ):
            if wrong:
                raise PlanError(f"BottleneckAdapter.{what}.", "See `holdfast methods BottleneckAdapter`.")
        core = inner(ctx.model)
        found = {sublayer_of(core, name, m) for name, m in core.named_modules()}
        for part in (p for p in FORMS[self.form] if p not in found):
            what = f"BottleneckAdapter finds no {part} part in the blocks of {type(core).__name__}."
            raise PlanError(what, "Use another form, or LoRA.")

    def replace(self, name: str, module: nn.Module, ctx: Context, state: State) -> Replaced | None:
        if sublayer_of(ctx.model, name, module) not in FORMS[self.form]:
            return None
        size, scale = size_for(ctx.model, self.reduction_factor), self.scale if self.form == "parallel" else None
        like = next(module.parameters())
        return Adapted(module, Bottleneck(width_of(ctx.model), size, self.activation, like), scale)


class Adapted(Replaced):
    """A part of a block with a bottleneck.

    Args:
        scale: of the bottleneck that stands beside the part; None: it stands behind it.
    """

    def __init__(self, original: nn.Module, adapter: Bottleneck, scale: float | None = None):
        super().__init__(original)
        self.adapter, self.scale = adapter, scale

    def changed(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base_layer(*args, **kwargs)
        states: torch.Tensor = states_of(out)
        if self.scale is None:
            return with_states(out, states + self.adapter(states))
        return with_states(out, states + self.scale * self.adapter(first_of(args, kwargs)))
