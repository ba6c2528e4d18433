"""O-LoRA: an adapter that reads other directions of the inputs than the adapters of earlier tasks do.

    A_prev (R, n): the rows of all earlier A of a map, and the `principal` main input directions of its weight
    loss += weight * sum_maps sum |A_prev A^T|                      soft (the authors' code)
    after each step, and at the start: A <- A (I - Q^T Q)           hard (ours); Q (h, n): orthonormal, spans A_prev

Where A_prev A^T is 0, inputs made of the directions of A_prev go through the map as before. (PEFT's "olora" start is
another method.) Earlier adapters are named by their folders; the run's model is what they came to: with the last one
as the model, Holdfast tunes on all of them merged, and only their A is read here.
`principal` (ours, 0 in the paper) holds directions of the base itself: otherwise the first task is plain LoRA, which
this method refuses to be.
Differences from the paper: earlier adapters are merged and not run beside the model, so nothing grows; the penalty
counts once a step, where the authors' code adds it once a micro-batch; its second penalty, on the size of A and B, is
0 in the authors' script and left out. The code sums |entries|; whether the paper squares them was not verified.
The sum grows with the number of maps and of earlier rows; hard mode has no weight to choose.
Cost: soft: R r products a map; hard: two thin products a step. With `principal` an SVD of every map at the start.
Combine with: every data and loss method, Replay, WiSEFT. Do not combine with: LoRA and its other relatives.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.pytorch_utils import Conv1D

from holdfast.engine.shards import whole
from holdfast.errors import PlanError
from holdfast.method import Paper, State, Term
from holdfast.methods.adapt._adapter import Adapter, layers
from holdfast.methods.adapt._matrices import inputs_of, of_few_bits
from holdfast.recipe import locate
from holdfast.services import Context, View

WEIGHTS = "adapter_model.safetensors"
A = ".lora_A."  # in the names of the parameters that this method looks at


@dataclass(frozen=True, kw_only=True)
class OrthogonalLoRA(Adapter):
    """O-LoRA (EMNLP Findings 2023), arXiv 2310.14152.

    Raises:
        PlanError: as LoRA; nothing to be orthogonal to, as many directions as a map has, or an earlier adapter that
            cannot be read, does not fit, or has no A for any of the maps.
    """

    r: int = 8  # the authors' scripts
    lora_alpha: float = 16  # ours: 2 r
    earlier: tuple[str, ...] = ()  # folders of adapters
    principal: int = 0  # ours
    weight: float = 0.5  # the authors' script for Llama
    hard: bool = False  # the paper is soft

    confined: ClassVar = True
    paper: ClassVar = Paper("Orthogonal Subspace Learning for Language Model Continual Learning", "2310.14152",
                            "its results on unseen tasks were not verified")  # fmt: skip
    does: ClassVar = "trains an adapter orthogonal to those of earlier tasks"
    strengths: ClassVar = ("weight",)

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if self.weight < 0 or self.principal < 0:
            raise PlanError("OrthogonalLoRA needs weight and principal of at least 0.", "Mend them.")
        if not self.earlier and not self.principal:
            what = "OrthogonalLoRA has nothing to be orthogonal to: without earlier adapters it is LoRA."
            raise PlanError(what, "Name folders of adapters in earlier, set principal, or take LoRA.")
        maps = self.maps(ctx.model)
        packed = next((n for n, m in maps.items() if self.principal and of_few_bits(m)), None)
        if packed:
            what = f"OrthogonalLoRA.principal decomposes plain weights, but {packed} has few bits."
            raise PlanError(what, "Load it unquantised, or name adapters in earlier alone.")
        for name, rows in self._earlier(ctx, maps):
            if rows.shape[1] != inputs_of(maps[name]):
                what = f"OrthogonalLoRA.earlier: an A of {name} has {rows.shape[1]} inputs, the map has "
                raise PlanError(f"{what}{inputs_of(maps[name])}.", "Name adapters of this model.")

    def _earlier(self, ctx: Context, maps: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """(map, A) of all earlier adapters."""
        from safetensors.torch import load_file

        for folder in self.earlier:
            found = locate(folder, ctx.base_dir or Path.cwd())
            if not found or not (found / WEIGHTS).is_file():
                raise PlanError(f"OrthogonalLoRA.earlier: no {WEIGHTS} in {folder!r}.", "Name folders of adapters.")
            weights = {k.removeprefix("base_model.model."): v for k, v in load_file(found / WEIGHTS).items()}
            rows = {n: weights[f"{n}{A}weight"] for n in maps if f"{n}{A}weight" in weights}
            if not rows:
                what = f"OrthogonalLoRA.earlier: {folder!r} has no A of a map that trains here."
                raise PlanError(what, "Name adapters of this model, or other target_modules.")
            yield from rows.items()

    @torch.no_grad()
    def prepare(self, ctx: Context) -> State:
        """A_prev (R, n) and Q (h, n) of every map that has some, by its name."""
        maps = self.maps(ctx.model)
        rows: dict[str, list[torch.Tensor]] = {n: [] for n in maps}
        for name, a in self._earlier(ctx, maps):
            rows[name].append(a.float())
        state: State = {}
        for name, m in maps.items():
            w = whole_weight(m)
            if self.principal:
                rows[name].append(torch.linalg.svd(w.float(), full_matrices=False).Vh[: self.principal].clone())
            if rows[name]:
                state[f"A/{name}"] = torch.cat([a.to(w.device) for a in rows[name]]).contiguous()
                state[f"Q/{name}"] = q = basis(state[f"A/{name}"])
                if self.hard and len(q) >= q.shape[1]:
                    what = f"OrthogonalLoRA: the earlier directions of {name} fill all of its {q.shape[1]} inputs."
                    raise PlanError(what, "Name fewer adapters, lower principal, or set hard to false.")
        return state

    @torch.no_grad()
    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        model = super().adapt(model, ctx, state)
        for name, module in layers(model).items():
            if self.hard and f"Q/{name}" in state:
                a = module.lora_A["default"].weight
                a.copy_(outside(a, state[f"Q/{name}"]))
        return model

    def loss(self, view: View) -> Term | None:
        if self.hard or not self.weight:
            return None
        pairs = [(view.state.get(f"A/{n.split(A)[0]}"), p) for n, p in view.params.items() if A in n]
        with torch.autocast(view.logits.device.type, enabled=False):  # in bf16 what is left of an overlap is noise
            terms = [(a @ whole(p).float().T).abs().sum() for a, p in pairs if a is not None]
        return Term(self.weight * torch.stack(terms).sum()) if terms else None

    def touches(self, name: str, param: torch.Tensor) -> bool:
        return self.hard and A in name

    def update(self, name: str, step: torch.Tensor, param: torch.Tensor, state: State) -> torch.Tensor:
        q = state.get(f"Q/{name.split(A)[0]}")
        return step if q is None else outside(param + step, q) - param


def outside(a: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(r, n) rows of `a` without what lies in the span of the orthonormal rows of q (h, n)."""
    return a - ((a.float() @ q.T) @ q).to(a.dtype)


def basis(rows: torch.Tensor) -> torch.Tensor:
    """(h, n) orthonormal rows that span those of `rows` (R, n); h is their rank."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    return vh[s > 1e-6 * s[0]].contiguous()


def whole_weight(module: Any) -> torch.Tensor:
    """(m, n) of a linear map; Conv1D keeps it turned."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight
