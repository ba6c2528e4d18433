"""FPF, k-FPF: tune, then train only the modules that moved most, on other rows, to repair what was forgotten.

    stage "train"    the plan's own training, without the rows for repair
    score            s_m = mean |theta_m - theta_0| of a tensor m / median of that over the tensors of its type
    chosen           largest scores first, as long as they fit into `budget` of the model's entries
    stage "repair"   only the chosen tensors train, on `sources` alone;   k times in turn

Type: the name without the number of its layer; a tensor without fellows (embeddings, final norm, head) is compared
with all. k 1 is FPF, after a whole training; more of them are k-FPF, at k equally spaced times. What is not chosen
stays to the last bit in a repair.
Experimental: the paper was read in abstract and summaries only. That few modules forget, and to train these on
replayed rows, is theirs; this score is ours (they compare changes between and within tasks), and so are budget and
shares. Differences: one task a run, so rows for repair are general text and instructions, or earlier tasks' files in
`sources`; no logits are matched (k-FPF-KD); gradients are made for all tensors in a repair too.
Cost: `repair_share` of the steps, a copy of the base and a mask. Combine with: data and loss methods. Not with: LoRA.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch

from holdfast.data.mix import Mix, Source
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Stage, State
from holdfast.methods.data.replay import GENERAL, cut_rows, read_sources
from holdfast.services import Context

REPAIRS, CHOSEN = "repairs", "chosen/"


@dataclass(frozen=True, kw_only=True)
class FPF(Method):
    """Forgetting prioritized finetuning (Zhao et al., ICML 2023), arXiv 2304.04158."""

    k: int = 1  # repairs; the paper's k-FPF about 9 (unverified)
    budget: float = 0.1  # ours: part of the model's entries that a repair may change
    repair_share: float = 0.2  # ours: part of the steps
    sources: tuple[str, ...] = GENERAL  # files of rows for repair
    max_tokens: int = 256  # ours; longer rows are cut

    paper: ClassVar = Paper("Does Continual Learning Equally Forget All Parameters?", "2304.04158",
                            "read in abstract and summaries only; the score is ours")  # fmt: skip
    does: ClassVar = "tunes, then repairs the few modules that moved most on other rows"
    needs: ClassVar = frozenset({"dense", "base_weights"})

    def off(self) -> bool:
        return self.repair_share == 0 or self.k == 0

    def check(self, ctx: Context) -> None:
        for wrong, what in (
            (not 0 < self.budget <= 1, f"budget is {self.budget}, but it is a share above 0"),
            (not 0 <= self.repair_share < 1, f"repair_share is {self.repair_share}, but it is a share below 1"),
            (self.k < 0, f"k is {self.k}, but it counts repairs"),
            (not self.sources, "sources is empty, so there are no rows for repair"),
            (0 < ctx.total_steps < 2 * self.k, f"k is {self.k}, too many for a run of {ctx.total_steps} steps"),
        ):
            if wrong:
                raise PlanError(f"FPF.{what}.", "See `holdfast methods FPF`.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        for path in self.sources:
            rows = read_sources((path,), ctx, owner="task", source=f"FPF:{Path(path).stem}")
            usable = cut_rows(rows, self.max_tokens, f"FPF, {Path(path).name}", ctx)
            mix = mix.add(Source(self._source(path), usable, self.repair_share / len(self.sources)))
        return mix

    def _source(self, path: str) -> str:
        return f"FPF:{path}"

    def stages(self) -> tuple[Stage, ...]:
        own, share = tuple(map(self._source, self.sources)), self.repair_share
        return tuple(
            stage
            for n in range(1, self.k + 1)
            for stage in (Stage(f"train {n}", 1 - share, without=own), Stage(f"repair {n}", share, sources=own))
        )

    def stage_ends(
        self, stage: Stage, params: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], state: State
    ) -> State:
        if stage.name.startswith("repair"):
            return {REPAIRS: torch.tensor(False)}
        moved = {n: float((params[n].float() - base[n].float()).abs().mean()) for n in params}
        room = self.budget * sum(w.numel() for w in base.values())
        chosen = most_forgetful(scores(moved), {n: params[n].numel() for n in params}, room)
        if not chosen:
            what = f"FPF.budget is {self.budget}, but no tensor that moved is so small."
            raise PlanError(what, "Raise it.")
        return {REPAIRS: torch.tensor(True)} | {CHOSEN + n: torch.tensor(n in chosen) for n in params}

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor | None:
        if not bool(state.get(REPAIRS, False)):
            return None
        return torch.full_like(param, bool(state[CHOSEN + name]), dtype=torch.bool)


def scores(moved: Mapping[str, float]) -> dict[str, float]:
    """Mean change of each tensor over the median of its type; 0 where that is 0."""
    types: dict[str, list[float]] = {}
    for name, change in moved.items():
        types.setdefault(_type(name), []).append(change)
    whole = median(moved.values())
    middle = {kind: median(changes) if len(changes) > 1 else whole for kind, changes in types.items()}
    return {n: change / m if (m := middle[_type(n)]) else 0.0 for n, change in moved.items()}


def _type(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def most_forgetful(score: Mapping[str, float], sizes: Mapping[str, int], room: float) -> set[str]:
    """The tensors of largest score that fit together into `room` entries; those of score 0 never."""
    left, chosen = room, set()
    for name in sorted((n for n in score if score[n] > 0), key=lambda n: (-score[n], n)):
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return chosen
