"""S2FT: train a few channels of some matrices as dense slices beside the frozen rest.

    y = W x + S x[I]        down, o: columns I of W,   S (m, |I|)
    y[I] = (W x)[I] + S x   up, v: rows I of W,        S (|I|, n)
    S = 0 at the start; folded in, W[:, I] += S or W[I] += S

So the numbers are those of training these columns or rows alone, and all others stay as they are. A channel is a row
of up with a column of down; a head is the rows of v with the columns of o. They are drawn at random over all layers
together, `ratio` of them, once for a run; what two ratios of a couple train is nested, so that coupled parts train
together. Under grouped queries the unit is a key-value head with the o columns of all query heads that read it: rows
and columns are counted on each matrix's own side, so both belong to the same heads.
Differences from the paper: no permutation of the model (the official code permutes coupled matrices, does not undo it
on saving, and mixes up heads under grouped queries), so the change is where it belongs; channels are not chosen by
weights, activations or gradients; q, k and gate do not train. What the paper says of forgetting was not verified.
Cost: that of a LoRA with as many numbers; the backward keeps |I| / n of a map's input. Weight decay pulls S to 0, so
to the base.
Combine with: data methods, KLToBase, ICLAnchor. Do not combine with: LoRA, what compares weights with the base's.
Export: the slices, for `holdfast.load`; with export.merge a plain model, equal to the base but for the slices.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from holdfast.engine.replaced import Replaced
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.methods.adapt._parts import is_map, part_of, with_weight
from holdfast.services import Context, State

COUPLES = (("down", "up"), ("o", "v"))  # columns of the first, rows of the second
COLUMNS = ("down", "o")


@dataclass(frozen=True, kw_only=True)
class S2FT(Method):
    """S2FT (NeurIPS 2024), arXiv 2412.06289.

    Raises:
        PlanError: ratios outside of [0, 1], all of them 0, or a ratio of a part that the model does not have.
    """

    d_ratio: float = 0.03  # official script: of the channels, columns of down
    u_ratio: float = 0.0  # official script: rows of up
    o_ratio: float = 0.0  # official script: of the heads, columns of o
    v_ratio: float = 0.0  # official script: rows of v
    seed: int = 0

    paper: ClassVar = Paper(
        "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
        "2412.06289",
        note="the id is from memory",
    )
    does: ClassVar = "trains a few channels or heads as dense slices of frozen matrices"
    wraps: ClassVar = True

    def ratios(self) -> dict[str, float]:
        """Part -> share of its channels or heads."""
        return {"down": self.d_ratio, "up": self.u_ratio, "o": self.o_ratio, "v": self.v_ratio}

    def check(self, ctx: Context) -> None:
        for part, ratio in self.ratios().items():
            if not 0 <= ratio <= 1:
                raise PlanError(f"S2FT.{part[0]}_ratio is {ratio}.", "Use a part of the channels, from 0 to 1.")
        if not any(self.ratios().values()):
            raise PlanError("S2FT trains nothing: all its ratios are 0.", "Set d_ratio, or remove S2FT.")
        found = {part for maps in _maps(ctx.model).values() for part in maps}
        for part in (p for p, ratio in self.ratios().items() if ratio and p not in found):
            what = f"S2FT.{part[0]}_ratio asks for {part} maps, but this model has none (fused or unusually named)."
            raise PlanError(what, "Set it to 0, or use another method.")

    def prepare(self, ctx: Context) -> State:
        core, places, state = inner(ctx.model), _maps(ctx.model), dict[str, torch.Tensor]()
        for couple in COUPLES:
            asked = {p: ratio for p, ratio in self.ratios().items() if ratio and p in couple}
            own = {place: maps for place, maps in places.items() if asked.keys() & maps.keys()}
            counts = {place: _units(core, place, maps) for place, maps in own.items()}
            order = drawn(counts, f"S2FT/{self.seed}/{couple[0]}")
            for part, ratio in asked.items():
                units: dict[str, list[int]] = defaultdict(list)
                for place, unit in order[: max(1, round(ratio * len(order)))]:
                    units[place].append(unit)
                for place in (p for p in units if part in own[p]):
                    name = own[place][part]
                    state[name] = channels(units[place], _side(core, name) // counts[place])
        return state

    def replace(self, name: str, module: nn.Module, ctx: Context, state: State) -> Replaced | None:
        if name not in state:
            return None
        return Slices(module, state[name], columns=part_of(name) in COLUMNS)

    def merged(self, name: str, module: Replaced) -> nn.Module:
        assert isinstance(module, Slices)
        return module.folded()


class Slices(Replaced):
    """A frozen linear map with some of its columns, or rows, trained beside it.

    Args:
        index: (k,) which of them. columns: whether they are columns.
    """

    def __init__(self, original: nn.Module, index: torch.Tensor, *, columns: bool):
        super().__init__(original)
        assert isinstance(original, nn.Linear)
        weight, self.columns = original.weight, columns
        self.register_buffer("index", index.to(weight.device), persistent=False)
        shape = (weight.shape[0], len(index)) if columns else (len(index), weight.shape[1])
        self.slices = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self.columns:
            return y + linear(x.index_select(-1, self.index), self.slices)
        return y.index_add(-1, self.index, linear(x, self.slices).to(y.dtype))

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The plain map that computes the same."""
        weight = self.base_layer.weight.float()
        dim = 1 if self.columns else 0
        return with_weight(self.base_layer, weight.index_add(dim, self.index, self.slices.float()))


def _maps(model: Any) -> dict[str, dict[str, str]]:
    """Place of a feed-forward net or an attention -> part -> name of its map."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, module in inner(model).named_modules():
        if (part := part_of(name)) and is_map(model, name, module):
            found[name.rpartition(".")[0]][part] = name
    return {place: {p: n for p, n in maps.items() if p != "o" or "v" in maps} for place, maps in found.items()}


def _side(core: Any, name: str) -> int:
    """How many columns or rows a map has, whichever it trains."""
    module = core.get_submodule(name)
    return module.in_features if part_of(name) in COLUMNS else module.out_features


def _units(core: Any, place: str, maps: Mapping[str, str]) -> int:
    """How many channels or key-value heads stand at a place."""
    if "v" not in maps:
        return _side(core, maps["down"] if "down" in maps else maps["up"])
    width, config = getattr(core.get_submodule(place), "head_dim", None), core.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return _side(core, maps["v"]) // width if width else heads


def drawn(counts: Mapping[str, int], seed: str) -> list[tuple[str, int]]:
    """All (place, unit) in an order that depends on the seed and the counts alone."""
    every = [(place, unit) for place, count in counts.items() for unit in range(count)]
    return random.Random(seed).sample(every, len(every))


def channels(units: Sequence[int], width: int) -> torch.Tensor:
    """(len(units) * width,) the columns or rows of units that are `width` wide, ascending."""
    return (torch.tensor(sorted(units))[:, None] * width + torch.arange(width)).flatten()
