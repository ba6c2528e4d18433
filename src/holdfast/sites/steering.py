"""Feedback: methods that look at the losses of the run and steer it.

Before each step of the optimizer every method that steers is shown the step at hand (`method.Past`) and answers with
factors (`method.Steer`). Factors of the learning rate multiply, and so do weights of sources; what one freezes is
frozen; an end by one ends the run after the step. What a method wants to remember goes into its state, which
checkpoints hold, so a run that goes on steers as if it had not stopped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from holdfast.method import Method, Past, State


class Steering:
    """What the steering methods of a plan ask for at the step at hand."""

    def __init__(self, methods: Sequence[Method], state: Mapping[str, State]):
        self.methods = [m for m in methods if "steer" in m.sites()]
        self.state = state
        self.lr_factor, self.source_weight, self.frozen, self.ended = 1.0, {}, (), ""
        self._rates: list[tuple[dict[str, Any], float]] = []

    def ask(self, past: Past) -> list[str]:
        """Ask every method about a step; returns the names of those that answered (to watch is to be at work)."""
        self.lr_factor, weights, frozen = 1.0, {}, []
        answered = []
        for m in self.methods:
            said = m.steer(past, self.state[m.name])
            if said is None:
                continue
            self.state[m.name].update(said.state)
            self.lr_factor *= said.lr_factor
            for source, weight in said.source_weight.items():
                weights[source] = weights.get(source, 1.0) * weight
            frozen += said.freeze
            self.ended = self.ended or (f"{m.name}: {said.end}" if said.end else "")
            answered.append(m.name)
        self.source_weight, self.frozen = weights, tuple(frozen)
        return answered

    def freeze(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        """No gradient for what is frozen: the optimizer then passes it by, decay included."""
        for name, p in params.items():
            if any(re.search(pattern, name) for pattern in self.frozen):
                p.grad = None

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
