"""Element masks: which entries of a parameter train. What several methods choose is intersected.

Gradients outside the chosen entries are zeroed before any other change of them, the entries outside are put back after
the optimizer's step to the last bit (weight decay and stale moments would move them), and when the entries are drawn
anew the moments of those that leave are dropped, so that an entry that comes back starts as a new one. What leaves
keeps its value or goes back to the base's, as the methods say; the planner refuses two that say different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from holdfast.engine.shards import cut_like, whole
from holdfast.method import Method, State

PREFIX = "entries/"  # of a drawn mask in the state of its method, which checkpoints hold


class Entries:
    """The chosen entries of one run.

    Args:
        methods: of the plan.
        state: each method's state by name; drawn masks are kept there.
    """

    def __init__(self, methods: Sequence[Method], state: Mapping[str, State]):
        self.methods = [m for m in methods if "entries" in m.sites()]
        self.state = state
        self.masks: dict[str, torch.Tensor] = {}  # by parameter, cut as it is cut
        self._before: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def draw(
        self,
        step: int,
        params: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer | None,
        *,
        begins: bool = False,
        base: Mapping[str, torch.Tensor] | None = None,
    ) -> bool:
        """Ask the methods that redraw before `step`, all of them where a stage begins; whether anything was drawn.

        base: the base's weights, cut as `params` are, for methods whose entries return.
        """
        asked = [m for m in self.methods if begins or m.redraws(step)]
        for m in asked:
            own = self.state[m.name]
            for name, p in params.items():
                chosen = m.entries(name, whole(p.detach()), own, step)
                own.pop(PREFIX + name, None)
                if chosen is not None:
                    own[PREFIX + name] = chosen
        if asked:
            self.combine(params)
            self._drop_moments(params, optimizer)
            if any(m.leaves == "return" for m in self.methods):
                self._go_back(params, base or {})
        return bool(asked)

    def _go_back(self, params: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> None:
        """What is not chosen has the base's value: it never trained, or it left."""
        for name, mask in self.masks.items():
            p = params[name]
            p.copy_(torch.where(mask, p.detach(), base[name].to(p.dtype)))

    def combine(self, params: Mapping[str, torch.Tensor]) -> None:
        """Intersect what each method drew last; after a restart too."""
        self.masks = {}
        for name, p in params.items():
            drawn = [self.state[m.name][PREFIX + name] for m in self.methods if PREFIX + name in self.state[m.name]]
            if drawn:
                both = drawn[0]
                for other in drawn[1:]:
                    both = both & other
                self.masks[name] = cut_like(both.to(p.device), p)

    def _drop_moments(self, params: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            return
        for name, mask in self.masks.items():
            for value in optimizer.state.get(params[name], {}).values():
                if isinstance(value, torch.Tensor) and value.shape == params[name].shape:
                    value.mul_(mask)

    def mask_gradients(self, params: Mapping[str, torch.Tensor]) -> None:
        """Zero the gradients of what does not train."""
        for name, mask in self.masks.items():
            grad = params[name].grad
            if grad is not None:
                grad.mul_(mask)

    def keep(self, params: Mapping[str, torch.Tensor]) -> None:
        """Remember the weights before the optimizer's step."""
        self._before = {name: params[name].detach().clone() for name in self.masks}

    def put_back(self, params: Mapping[str, Any]) -> None:
        """After the step: every entry that does not train as it was before."""
        for name, before in self._before.items():
            p = params[name]
            p.copy_(torch.where(self.masks[name], p.detach(), before))
        self._before = {}

    @property
    def share(self) -> float:
        """Part of the entries of masked parameters that trains."""
        total = sum(m.numel() for m in self.masks.values())
        return sum(float(whole(m).sum()) for m in self.masks.values()) / total if total else 1.0
