"""Connected adapters (IAA, experimental): adapters behind every block, linked by others that run beside the blocks.

    h' = layer(h) + g(layer(h)) + a(h),   g, a bottlenecks as of `BottleneckAdapter`, 0 at the start

g is inserted, a ("aside") carries what the adapters below gave past the frozen block to the next one, so that there is
a path through trained weights alone from the bottom to the top. Step 0 is the base.
Experimental: the paper has three forms of the link (beside the feed-forward net, the attention, or the whole layer),
and their exact formulas could not be verified; this is the last one as we read it. The paper is about encoders for
retrieval and has no code for language models. In blocks with a residual stream a path past the block is there already.
Not linear, so it cannot be merged: `holdfast.load` loads what is exported.
Cost: two bottlenecks a block, 2 (2 d k + d + k) numbers.
Combine with: data methods, KLToBase, ICLAnchor. Do not combine with: LoRA, what compares weights with the base's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from holdfast.engine.replaced import Replaced
from holdfast.engine.ways import blocks
from holdfast.errors import ModelError, PlanError
from holdfast.method import Method, Paper
from holdfast.methods.adapt._bottleneck import (
    ACTIVATIONS,
    Bottleneck,
    first_of,
    size_for,
    states_of,
    width_of,
    with_states,
)
from holdfast.services import Context, State


@dataclass(frozen=True, kw_only=True)
class ConnectedAdapter(Method):
    """Inserted and aside adapters (CIKM 2022), arXiv 2208.09847; experimental.

    Raises:
        PlanError: a reduction below 1, or an unknown activation.
    """

    reduction_factor: float = 32.0  # ours; paper: below 1 % of the weights
    activation: str = "relu"  # or gelu, silu

    paper: ClassVar = Paper(
        "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval",
        "2208.09847",
        note="the exact forms of the link were not verified",
    )
    does: ClassVar = "trains adapters behind and beside every block that are linked from bottom to top (experimental)"
    wraps: ClassVar = True

    def check(self, ctx: Context) -> None:
        for wrong, what in (
            (self.activation not in ACTIVATIONS, f"activation is {self.activation!r}, not {', '.join(ACTIVATIONS)}"),
            (self.reduction_factor < 1, f"reduction_factor is {self.reduction_factor}, but it is at least 1"),
        ):
            if wrong:
                raise PlanError(f"ConnectedAdapter.{what}.", "See `holdfast methods ConnectedAdapter`.")

    def replace(self, name: str, module: nn.Module, ctx: Context, state: State) -> Replaced | None:
        if not any(module is block for block in blocks(ctx.model)):
            return None
        size, width = size_for(ctx.model, self.reduction_factor), width_of(ctx.model)
        inserted, aside = (
            Bottleneck(width, size, self.activation, next(module.parameters())) for _ in ("inserted", "aside")
        )
        return Connected(module, inserted, aside)


class Connected(Replaced):
    """A frozen block with an adapter behind it and one beside it."""

    def __init__(self, original: nn.Module, inserted: Bottleneck, aside: Bottleneck):
        super().__init__(original)
        self.inserted, self.aside = inserted, aside

    def changed(self, *args: Any, **kwargs: Any) -> Any:
        before: torch.Tensor = first_of(args, kwargs)
        if before.ndim != 3:
            what = f"ConnectedAdapter reads the states of a block, but {type(self.base_layer).__name__} has several."
            raise ModelError(what, "Use another method with this model.")
        out = self.base_layer(*args, **kwargs)
        after = states_of(out)
        return with_states(out, after + self.inserted(after) + self.aside(before))
