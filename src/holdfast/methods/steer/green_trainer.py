"""GreenTrainer: train the tensors that help most for the backward passes one is ready to pay.

    importance of tensor k:   I_k = - sum_i g_ki dw_ki / max |I|,   dw a step of the optimizer, g the gradient after it
    cost of the backward:     sum of dw_k over what trains + sum of dy_j over all that lies above the deepest of it
    dw_k = dy_k = entries of the matrix (dy of the embeddings: 0, and of a head that shares their table: its
    entries, which every backward pays);   forward: sum of dy
    choose by dynamic programming, so that the sum of I is largest and the cost at most
        rho' (sum dw + sum dy),   rho' = rho (1 + f) - f,   f = forward / backward of full tuning

All tensors train at the first step with a learning rate, and at one step every `epochs` epochs; how far the loss of
the next step falls along what that step did is the importance. In between, what was not chosen stays to the last bit,
and no gradient of it is made: there is no backward below the deepest chosen tensor. Fewer tensors move; that this
keeps more is no claim of the paper.
Differences from it: the step that is measured is a step of the run and not taken back, so the optimizer's moments see
nothing that did not happen. The gradient after it is that of the step which follows anyway, on the next rows; the
authors' code runs the same rows once more. Costs count products with weights alone, without attention's own; tensors
stand in the order in which the model defines them. Several processes of a trainer make and drop the gradients: no time
is saved.
Cost: between the two steps a copy of what trains. With unknown lengths of an epoch (a stream in a trainer) it chooses
once.
Combine with: data and loss methods, HalfFineTune, WiSEFT. Do not combine with: LoRA.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, State, Steer, canonical
from holdfast.services import Context

WEIGHT, CHOSEN = "weight/", "chosen/"


@dataclass(frozen=True, kw_only=True)
class GreenTrainer(Method):
    """Adaptive backpropagation, arXiv 2309.13192.

    Raises:
        PlanError: rho not above 1/3 (the forward's own part) or above 1, epochs or resolution below 1.
    """

    rho: float = 0.5  # of full tuning's time; the paper: 0.4, 0.5, 0.7
    epochs: int = 2  # the paper: from one choice to the next
    resolution: int = 1000  # the authors' code: parts into which costs are divided

    paper: ClassVar = Paper("Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation",
                            "2309.13192", "its tables were not verified; it says nothing of forgetting")  # fmt: skip
    does: ClassVar = "trains the tensors that help most for the backward passes it may spend"
    needs: ClassVar = frozenset({"dense", "gradients"})

    def check(self, ctx: Context) -> None:
        if not 1 / 3 < self.rho <= 1:
            what = f"GreenTrainer.rho is {self.rho}, but the forward alone is a third of full tuning."
            raise PlanError(what, "Use a part above 1/3 and at most 1, such as 0.5.")
        if self.epochs < 1 or self.resolution < 1:
            raise PlanError("GreenTrainer needs epochs and resolution of at least 1.", "Mend them.")

    def steer(self, past: Past, state: State) -> Steer:
        """Measure at one step, choose at the next, and hold still what was not chosen until it is measured again."""
        rounds = torch.tensor(past.epochs // self.epochs)
        if any(k.startswith(WEIGHT) for k in state):
            chosen = self._choose(past, state)
            for key in [k for k in state if k.startswith((WEIGHT, CHOSEN))]:
                del state[key]
            still = _patterns(past, chosen)
            kept = {f"{CHOSEN}{n}": torch.tensor(True) for n in chosen}
            return Steer(freeze=still, freeze_next=still, state={**kept, "round": rounds})
        due = {"due": torch.tensor(True), "round": rounds}
        if "round" not in state or bool(state["due"]):
            if not past.learning_rate:  # a schedule that begins at 0: this step does nothing
                return Steer(state=due)
            found: State = {"due": torch.tensor(False), "round": rounds}
            for name in past.grads:
                found[f"{WEIGHT}{name}"] = past.params[name].clone()
            return Steer(state=found)
        if rounds > state["round"]:
            return Steer(state=due)
        return Steer(freeze_next=_patterns(past, {n for n in past.params if f"{CHOSEN}{n}" in state}))

    def _choose(self, past: Past, state: State) -> set[str]:
        """The names that train until the next choice."""
        importance = {}
        for name in (n for n in past.grads if f"{WEIGHT}{n}" in state):
            moved = past.params[name] - state[f"{WEIGHT}{name}"]
            importance[name] = -float((past.grads[name].double() * moved.double()).sum())
        names = [n for n, _ in _tensors(past.model)]
        sizes, through = _costs(past.model)
        back = sizes.sum() + through.sum()
        share = self.rho * (1 + through.sum() / back) - through.sum() / back
        most = max(map(abs, importance.values()), default=0.0) or 1.0
        value = np.zeros(len(sizes))
        value[: len(names)] = [importance.get(n, 0.0) / most for n in names]
        picked = best(value, sizes / back, through / back, share, self.resolution)
        if not picked:  # nothing helps, or fits: what costs least
            picked = [max(i for i, n in enumerate(names) if n in past.params)]
        return {names[i] for i in picked}


def best(value: np.ndarray, weigh: np.ndarray, through: np.ndarray, most: float, resolution: int = 1000) -> list[int]:
    """Which of K tensors, in forward order, to train.

    value: (K,) importance; weigh, through: (K,) cost of a tensor's gradient and of passing the error through it, parts
    of the whole backward; most: what may be spent. Costs are rounded down to 1 / resolution, sums of them as wholes.
    """

    def parts(costs: np.ndarray) -> np.ndarray:
        return np.floor(costs * resolution + 1e-9).astype(int)

    limit = int(parts(np.array(most)))
    cost = np.diff(parts(weigh.cumsum()), prepend=0)  # each rounded alone, all of them might not fit into the whole
    above = parts(through.sum() - through.cumsum())  # of all that lie above each
    held = np.zeros(limit + 1)  # by what may be spent on gradients: the largest value so far, from the top down
    taken = np.zeros((len(value), limit + 1), dtype=bool)
    top, end = 0.0, (-1, 0)
    for k in reversed(range(len(value))):
        if value[k] <= 0 or cost[k] > limit:
            continue
        new = np.concatenate([np.full(cost[k], -np.inf), held[: limit + 1 - cost[k]] + value[k]])
        left = limit - above[k]
        if left >= 0 and new[left] > top:
            top, end = new[left], (k, left)
        taken[k], held = new > held, np.maximum(new, held)
    return _walked(end, taken, cost)


def _walked(end: tuple[int, int], taken: np.ndarray, cost: np.ndarray) -> list[int]:
    """The tensors of the best choice: its deepest one, and those above it that the table says."""
    k, left = end
    if k < 0:
        return []
    picked, left = [k], left - cost[k]
    for above in range(k + 1, len(cost)):
        if taken[above, left]:
            picked.append(above)
            left -= cost[above]
    return picked


def _tensors(model: Any) -> Sequence[tuple[str, torch.Tensor]]:
    return [(canonical(n), p) for n, p in model.named_parameters()]


def _costs(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """(entries of each tensor's gradient, entries that an error passes through it), in forward order.

    Where the head is the table of the embeddings, what passes through the head is a last entry that none can train.
    """
    core, tensors = inner(model), _tensors(model)
    table = {id(p) for p in core.get_input_embeddings().parameters()}
    head = getattr(core.get_output_embeddings(), "weight", None)
    shared = [float(head.numel())] if head is not None and id(head) in table else []
    sizes = [float(p.numel()) for _, p in tensors]
    through = [0.0 if id(p) in table else size for (_, p), size in zip(tensors, sizes, strict=True)]
    return np.array([*sizes, *(0.0 for _ in shared)]), np.array([*through, *shared])


def _patterns(past: Past, chosen: set[str]) -> tuple[str, ...]:
    """What holds still, by patterns that find one name each."""
    return tuple(f"^{re.escape(n)}$" for n in past.params if n not in chosen)
