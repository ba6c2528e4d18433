"""Half fine-tuning: train a random half of every layer's matrices and freeze the other half.

    attention: 2 of {q, k, v, o};   feed-forward: 2 of {gate, up, down} in half of the layers, 1 in the other half;
    or 1 of {up, down} where there is no gate;   half of the norms;
    embeddings and head always train (switch: `train_embeddings`)

`rounds` splits the run into as many trainings; each begins with a new optimizer and schedule and draws another half:
what one round froze another may train, and in each the frozen half stays as the round found it. The paper draws anew
at each task; within one task rounds are ours.
Choosing "2 of 4" by count is half of the weights only when q, k, v, o have equal size. Under grouped-query attention
k and v are small, so by default (`exact_half`) one of {q, o} and one of {k, v} is drawn: exactly half always.
Cost: gradients and optimizer state halve. Frozen tensors stay bit-identical, with one round to the base; in half
precision what a round froze is rounded to it, as the export is.
Combine with: every loss and data method, ProMoT (with one round), WiSEFT. Do not combine with: LoRA.
"""

import random
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Stage, canonical, layer_of
from holdfast.methods.adapt._parts import ATTENTION, FEED_FORWARD, part_of
from holdfast.services import Context, State

ROUND = "round-"  # begins the names of its stages
NEEDED = (*ATTENTION, "up", "down")  # a gate is not in every feed-forward net


@dataclass(frozen=True, kw_only=True)
class HalfFineTune(Method):
    """HFT (Hui et al., ACL 2025), arXiv 2404.18466.

    Raises:
        PlanError: rounds below 1, or a layer without q, k, v, o, up or down of its own.
    """

    seed: int = 0
    exact_half: bool = True  # ours; False is the paper's rule by count (Sec. 3)
    train_embeddings: bool = True  # paper: embeddings and head always train
    rounds: int = 1  # paper: one for each task; each draws its own half

    confined: ClassVar = True
    paper: ClassVar = Paper("HFT: Half Fine-Tuning for Large Language Models", "2404.18466")
    does: ClassVar = "freezes a random half of each layer's matrices"
    needs: ClassVar = frozenset({"dense"})

    def check(self, ctx: Context) -> None:
        if self.rounds < 1:
            raise PlanError(f"HalfFineTune.rounds is {self.rounds}.", "Use at least 1.")

    def sites(self) -> tuple[str, ...]:
        """With one round the run is left whole, so that another method may split it."""
        return tuple(s for s in super().sites() if s != "stages" or self.rounds > 1)

    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(f"{ROUND}{n}") for n in range(self.rounds)) if self.rounds > 1 else ()

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        number = int(ctx.stage.removeprefix(ROUND)) if self.rounds > 1 else 0
        chosen = self.choose([canonical(n) for n, _ in model.named_parameters()], number)
        for name, p in model.named_parameters():
            if canonical(name) not in chosen:
                p.requires_grad_(False)
        return model

    def choose(self, names: list[str], number: int = 0) -> set[str]:
        """The names that train in a round, from 0."""
        draw = random.Random(f"HalfFineTune/{self.seed}" + (f"/{number}" if number else ""))
        layers: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        train: set[str] = set()
        for name in names:
            layer = layer_of(name)
            if layer is not None:
                layers[layer][_part(name)].append(name)
            elif "norm" in name or "ln_f" in name:
                train |= {name} if draw.random() < 0.5 else set()
            elif self.train_embeddings:
                train.add(name)
        _complete(layers)
        order = sorted(layers)
        two = set(draw.sample(order, len(order) // 2))  # layers that train two of gate, up, down
        for n in order:
            parts = [p for p in FEED_FORWARD if layers[n][p]]
            for part in self._attention(draw) + draw.sample(parts, min(2 if n in two else 1, len(parts) - 1)):
                train |= set(layers[n][part])
            norms = sorted(layers[n]["norm"])
            train |= set(draw.sample(norms, len(norms) // 2))
        return train

    def _attention(self, draw: random.Random) -> list[str]:
        if self.exact_half:
            return [draw.choice("qo"), draw.choice("kv")]
        return draw.sample(list(ATTENTION), 2)


def _part(name: str) -> str:
    stem = re.sub(r"\.(weight|bias)$", "", name)
    return part_of(stem) or ("norm" if "norm" in stem or ".ln" in stem else "other")


def _complete(layers: Mapping[int, Mapping[str, list[str]]]) -> None:
    """Refuse layers where a part is missing: it would be frozen in every half."""
    missing = next(((n, p) for n in sorted(layers) for p in NEEDED if not layers[n].get(p)), None)
    if missing or not layers:
        where = "{1} map in layer {0}".format(*missing) if missing else "layers"
        raise PlanError(
            f"HalfFineTune draws from q, k, v, o, up and down maps, and finds no {where} (fused or unusually named).",
            "Use Freeze with name patterns instead.",
        )
