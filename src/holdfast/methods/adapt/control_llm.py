"""Control LLM: trained copies of some layers run beside the frozen ones, and their states are mixed.

    h = h_p + a (h_e - h_p),   h_p = frozen layer(x),   h_e = its trained copy(x)
    loss += weight * mean_t mean_layers div(h_p, h_e),   div = |h_p - h_e|^2 / D  or  1 - cos(h_p, h_e)

a is a number (lerp), or sigmoid(w [h_p; h_e] + b) for each token, with w and b 0 at the start (dlerp). A copy begins
as its layer, so step 0 is the base; with the copies switched off the model is the base at any time.
Not from the paper: the divergence is taken at the answer's positions, which the whole step can count, and not at all
tokens or the last one; h_p is a fixed aim there, so that it does not pull the copies below (the paper's code says that
it detaches h_p, and does not). Left out: the paper's other mixtures (slerp, mixtures with a router, stacked layers),
and the magnitude in its code's cosine, which is always 0 there.
Cost: E / L more layers to hold and to run, in training and after it, and a second cache of keys and values for these.
The outcome is not linear in the weights, so it cannot be merged: `holdfast.load` loads what is exported.
Combine with: data methods, KLToBase, ICLAnchor. Do not combine with: LoRA, what compares weights with the base's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from holdfast.engine.replaced import Replaced, cache_in, copy_of, hand_out, make_room, set_cache_index
from holdfast.engine.ways import blocks
from holdfast.errors import ModelError, PlanError
from holdfast.method import Method, Paper, Term
from holdfast.services import Context, State, View

DIVERGENCE = "divergence"  # what the pairs hand out, (B, L)


@dataclass(frozen=True, kw_only=True)
class ControlLLM(Method):
    """Control LLM (2025), its "concat" form with lerp or dlerp.

    Raises:
        PlanError: no layer is taken, an unknown mixture or divergence, or a share outside of (0, 1].
    """

    every: int = 4  # 8 of 32 layers, the last of every four
    mixture: str = "lerp"  # for fine-tuning; dlerp for continued pre-training
    share: float = 0.5  # of the copy in lerp, fixed
    divergence: str = "mse"  # for fine-tuning; cosine for continued pre-training
    weight: float = 1.0  # alpha of the paper

    paper: ClassVar = Paper(
        "Control LLM: Controlled Evolution for Intelligence Retention in LLM",
        "2501.10979",
        note="the id is from memory; equations, defaults and what is said of the code were not checked",
    )
    does: ClassVar = "trains copies of some layers beside the frozen ones and mixes their states"
    strengths: ClassVar = ("weight",)
    wraps: ClassVar = True
    copies: ClassVar = True

    def check(self, ctx: Context) -> None:
        for wrong, what in (
            (self.every < 1, f"every is {self.every}, but a layer is taken of every 1 or more"),
            (self.mixture not in ("lerp", "dlerp"), f"mixture is {self.mixture!r}, but it is lerp or dlerp"),
            (self.divergence not in DIVERGENCES, f"divergence is {self.divergence!r}, but it is mse or cosine"),
            (not 0 < self.share <= 1, f"share is {self.share}, but it lies above 0 and not above 1"),
            (self.weight < 0, f"weight is {self.weight}, but it is not negative"),
        ):
            if wrong:
                raise PlanError(f"ControlLLM.{what}.", "See `holdfast methods ControlLLM`.")

    def layers(self, count: int) -> list[int]:
        """Which of `count` layers get a copy: the last of each of E equal parts."""
        taken = max(1, count // self.every)
        return [(i + 1) * count // taken - 1 for i in range(taken)]

    def replace(self, name: str, module: nn.Module, ctx: Context, state: State) -> Replaced | None:
        layers, width = list(blocks(ctx.model)), ctx.model.config.get_text_config().hidden_size
        for n, layer in enumerate(self.layers(len(layers))):
            if module is layers[layer]:
                return Pair(module, layer, len(layers) + n, width, self)
        return None

    def loss(self, view: View) -> Term | None:
        each = view.inside(DIVERGENCE, "task")
        return Term(self.weight * torch.stack(each).mean(0), "task") if each and self.weight else None


class Pair(Replaced):
    """A frozen layer, its trained copy, and the mixture of what they give.

    Args:
        layer: which layer of the model it is.
        cache: the layer of a cache of keys and values that the copy fills.
        width: D, of its states.
        method: its settings.
    """

    def __init__(self, original: nn.Module, layer: int, cache: int, width: int, method: ControlLLM):
        super().__init__(original)
        self.expanded, self.layer, self.cache = copy_of(original), layer, cache
        set_cache_index(self.expanded, cache)
        self.share, self.divergence = method.share, method.divergence
        if method.mixture == "dlerp":
            self.gate = nn.Linear(2 * width, 1, dtype=next(original.parameters()).dtype)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def changed(self, *args: Any, **kwargs: Any) -> Any:
        make_room(cache_in(args, kwargs), self.layer, self.cache)
        frozen = self.base_layer(*args, **kwargs)
        copied = self.expanded(*args, **kwargs)
        if not isinstance(frozen, tuple):
            return self._mixed(frozen, copied)
        return (self._mixed(frozen[0], copied[0]), *frozen[1:])

    def _mixed(self, frozen: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
        """(B, L, D) between the two branches; the divergence (B, L) is handed out."""
        if frozen.ndim != 3:
            what = (
                f"ControlLLM mixes the states of a layer, but {type(self.base_layer).__name__} gives several streams."
            )
            raise ModelError(what, "Use another method with this model.")
        hand_out(DIVERGENCE, DIVERGENCES[self.divergence](frozen.detach().float(), copied.float()))
        share = self.share
        if hasattr(self, "gate"):
            share = self.gate(torch.cat([frozen, copied], -1)).sigmoid()
        return frozen + share * (copied - frozen)


def mse(aim: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(...,) mean square difference over the last dimension."""
    return (states - aim).square().mean(-1)


def cosine(aim: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(...,) 1 - cosine over the last dimension."""
    return 1 - torch.cosine_similarity(aim, states, dim=-1)


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"mse": mse, "cosine": cosine}
