"""Feedback: methods that look at the losses of the run and steer it.

Before each step of the optimizer every method that steers is shown the step at hand (`method.Past`) and answers with
factors (`method.Steer`). Factors of the learning rate multiply, and so do weights of sources; what one freezes is
frozen; an end by one ends the run after the step. What a method wants to remember goes into its state, which
checkpoints hold beside what was asked for the next step, so a run that goes on steers as if it had not stopped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from holdfast.engine.processes import gather
from holdfast.engine.shards import whole
from holdfast.method import Method, Past, State


class Wholes(Mapping[str, torch.Tensor]):
    """Tensors by name, each gathered when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return whole(self._tensors[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Steering:
    """What the steering methods of a plan ask for at the step at hand.

    late: gradients of what holds still are dropped after the backward instead of not being made (DDP and FSDP settle
    beforehand which gradients will come).
    """

    def __init__(self, methods: Sequence[Method], state: Mapping[str, State]):
        self.methods = [m for m in methods if "steer" in m.sites()]
        self.state = state
        self.lr_factor, self.source_weight, self.frozen, self.ended = 1.0, {}, (), ""
        self.held: tuple[str, ...] = ()  # patterns of what holds still at the next step
        self.late = False
        self._by_source: Counter[str] = Counter()
        self._rates: list[tuple[dict[str, Any], float]] = []

    def note(self, sources: Sequence[str], loss: torch.Tensor) -> None:
        """Remember what the positions of each source bring to the task's loss: their sources, and (M,) addends."""
        if self.methods and torch.is_grad_enabled():
            for source in dict.fromkeys(sources):
                mine = torch.as_tensor([s == source for s in sources], device=loss.device)
                self._by_source[f"task/{source}"] += loss.detach()[mine].sum().item()

    def losses(self) -> dict[str, float]:
        """What was noted since the last call, over all processes."""
        total: Counter[str] = Counter()
        for own in gather(dict(self._by_source)):
            total.update(own)
        self._by_source.clear()
        return dict(total)

    def ask(self, past: Past, held_out: Mapping[str, Mapping[str, float]] | None = None) -> list[str]:
        """Ask every method about a step; returns the names of those that answered (to watch is to be at work).

        held_out: each method's losses of held-out rows, by its name.
        """
        self.lr_factor, weights, frozen, held = 1.0, {}, [], []
        answered = []
        for m in self.methods:
            shown = replace(past, held_out=(held_out or {}).get(m.name, {}))
            if "gradients" not in m.needs:
                shown = replace(shown, grads={})
            if "base_weights" not in m.needs:
                shown = replace(shown, base={})
            said = m.steer(shown, self.state[m.name])
            if said is None:
                continue
            self.state[m.name].update(said.state)
            self.lr_factor *= said.lr_factor
            for source, weight in said.source_weight.items():
                weights[source] = weights.get(source, 1.0) * weight
            frozen += said.freeze
            held += said.freeze_next
            self.ended = self.ended or (f"{m.name}: {said.end}" if said.end else "")
            answered.append(m.name)
        self.source_weight, self.frozen, self.held = weights, tuple(frozen), tuple(held)
        return answered

    def freeze(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        """No gradient for what is frozen: the optimizer then passes it by, decay included."""
        for name in _found(self.frozen, params):
            params[name].grad = None

    def hold(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        """Before the forward of a step: no gradient is made of what holds still, unless nothing else trains."""
        if not self.methods:
            return
        still = _found(self.held, params)
        for name, p in params.items():
            p.requires_grad_(self.late or len(still) == len(params) or name not in still)

    def drop(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        """After the backward: no gradient of what held still, where one was made all the same."""
        for name in _found(self.held, params):
            params[name].grad = None

    def saved(self) -> dict[str, Any]:
        """What was asked for the next step, for a checkpoint."""
        return {"source_weight": self.source_weight, "held": self.held}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint says."""
        self.source_weight, self.held = dict(saved["source_weight"]), tuple(saved["held"])

    def scale(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the optimizer's step: the learning rate of this step."""
        if self.lr_factor != 1.0:
            self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._rates:
                group["lr"] = rate * self.lr_factor

    def unscale(self) -> None:
        """After it: the schedule goes on from its own rate."""
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []


def _found(patterns: Sequence[str], names: Mapping[str, Any]) -> set[str]:
    """The names that one of the patterns finds."""
    return {n for n in names if any(re.search(p, n) for p in patterns)}
