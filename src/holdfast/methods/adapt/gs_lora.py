"""GS-LoRA: a LoRA on the feed-forward nets whose blocks are zeroed where they do not help, and that can unlearn rows.

    loss += weight * sum_blocks ||g_b||,   ||g_b|| = sqrt(sum of squares of all A and B of block b)
    loss += forget_weight * mean_rows relu(bound - CE(row)),   over rows of `forget`, CE the mean over the row's answer

The first term, a group lasso, pulls each block's adapter to 0 as a whole. In a loss it never gets there; `proximal`
leaves it out and scales every block after the step instead, by max(0, 1 - lr * weight / ||g_b||), so that blocks
become exactly 0 and stay there. For the same weight that is a far weaker pull, because AdamW does not rescale it.
The second term unlearns: rows whose loss has reached `bound` push no further. What is to be kept is the task's rows
and what else the plan trains on.
Differences from the paper: it bounds the mean of a batch, here it is each row, so that a step may be cut anywhere;
||g_b|| of the proximal step is that before the step, and lr that of the first group; its prototypes (GS-LoRA++) need
classes and are not offered. The paper is about vision; no figure of it was verified, and the ids are from memory.
Cost: that of the LoRA, a norm of each block, and `rows_per_step` rows a step where something is to be forgotten.
Combine with: every data and loss method, Freeze. Do not combine with: methods that train the model's own weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.engine.pack import TokenRow
from holdfast.engine.shards import whole
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.method import Method, Paper, Past, Steer, Term, layer_of
from holdfast.methods.adapt._parts import FEED_FORWARD, is_map, part_of
from holdfast.methods.adapt.lora import LoRA
from holdfast.methods.data._few import in_turn
from holdfast.methods.data.replay import read_sources
from holdfast.services import Context, State, View

EPSILON = 1e-12  # under the root, where a block is all zeros


@dataclass(frozen=True, kw_only=True)
class GSLoRA(Method):
    """Group-sparse LoRA (CVPR 2024), arXiv 2403.11530; its second paper 2501.09705.

    Raises:
        PlanError: values without meaning, a model without maps of feed-forward nets, or no row left to unlearn.
    """

    r: int = 8  # paper
    lora_alpha: float = 16  # ours: 2 r
    weight: float = 0.1  # alpha of the official code
    proximal: bool = False  # ours: exact zeros
    forget: tuple[str, ...] = ()  # files of rows to unlearn, as the sources of Replay
    forget_weight: float = 0.03  # beta, about that of the paper
    bound: float = 10.0  # official code, in nats
    rows_per_step: int = 1  # ours
    max_tokens: int = 256  # ours; rows to unlearn are cut here

    paper: ClassVar = Paper(
        "Continual Forgetting for Pre-trained Vision Models", "2403.11530", note="ids and defaults are from memory"
    )
    does: ClassVar = "trains a LoRA of the feed-forward nets with a group lasso on its blocks, and can unlearn rows"
    strengths: ClassVar = ("weight",)
    wraps: ClassVar = True
    whole_rows: ClassVar = True

    def check(self, ctx: Context) -> None:
        for wrong, what in (
            (self.r < 1, f"r is {self.r}, but a rank is at least 1"),
            (min(self.weight, self.forget_weight, self.bound) < 0, "weight, forget_weight and bound are not negative"),
            (min(self.rows_per_step, self.max_tokens) < 1, "rows_per_step and max_tokens are at least 1"),
        ):
            if wrong:
                raise PlanError(f"GSLoRA.{what}.", "See `holdfast methods GSLoRA`.")
        if not self._targets(ctx.model):
            what = f"GSLoRA finds no maps of feed-forward nets in {type(inner(ctx.model)).__name__}."
            raise PlanError(what, "Use LoRA.")

    @property
    def confined(self) -> bool:
        """Exact zeros stay zeros, and the base still knows what was unlearnt."""
        return self.proximal or bool(self.forget)

    def sites(self) -> tuple[str, ...]:
        """Without `proximal` no step is looked at or changed."""
        return tuple(s for s in super().sites() if self.proximal or s not in ("steer", "update"))

    def _targets(self, model: Any) -> tuple[str, ...]:
        named = inner(model).named_modules()
        return tuple(n for n, m in named if part_of(n) in FEED_FORWARD and is_map(model, n, m))

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        lora = LoRA(r=self.r, lora_alpha=self.lora_alpha, target_modules=self._targets(model))
        return lora.adapt(model, ctx, state)

    # ---- what is to be forgotten

    def asides(self, ctx: Context) -> Sequence[TokenRow]:
        if not (self.forget and self.forget_weight):
            return ()
        most = min(self.max_tokens, ctx.max_length)
        rows = read_sources(self.forget, ctx, owner=self.name)
        cut = [r.cut(most) for r in rows]
        kept = [r for r in cut if r.scored.any()]
        if not kept:
            what = f"GSLoRA.forget: none of its {len(rows)} rows has a part of its answer in the first {most} tokens."
            raise PlanError(what, "Raise max_tokens, or give shorter rows.")
        if len(kept) < len(rows):
            said = f"{len(rows) - len(kept)} of {len(rows)} rows: their answers begin behind {most} tokens"
            ctx.notes.append(f"GSLoRA does not unlearn {said}")
        return kept

    def asides_at(self, step: int, pool: int, total: int) -> Sequence[int]:
        return in_turn(step, self.rows_per_step, pool)

    def loss(self, view: View) -> tuple[Term, ...]:
        terms, groups = [], norms(view.params) if self.weight and not self.proximal else {}
        if groups:
            terms.append(Term(self.weight * torch.stack([*groups.values()]).sum()))
        at = view.positions(self.name)
        if len(at):
            of = view.rows(self.name)
            value = self.forget_weight * (self.bound - means(-view.token_logp[at], of)).relu()
            terms.append(Term(value, self.name, per="row"))
        return tuple(terms)

    # ---- the proximal step

    def steer(self, past: Past, state: State) -> Steer:
        pull = past.learning_rate * self.weight
        found = norms(past.params).items()
        # a block of zeros stays one, however small the pull has become
        return Steer(state={f"factor/{b}": (1 - pull / n).clamp_min(0) * (n > 2 * EPSILON**0.5) for b, n in found})

    def touches(self, name: str, param: torch.Tensor) -> bool:
        return layer_of(name) is not None

    def update(self, name: str, step: torch.Tensor, param: torch.Tensor, state: State) -> torch.Tensor:
        return (param + step) * state[f"factor/{layer_of(name)}"].to(param.device) - param


def norms(params: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Block -> the norm of all that trains in it; differentiable at 0."""
    squares: dict[int, list[torch.Tensor]] = {}
    for name, p in params.items():
        block = layer_of(name)
        if block is not None:
            squares.setdefault(block, []).append(whole(p.float().square().sum()))
    return {block: (torch.stack(every).sum() + EPSILON).sqrt() for block, every in squares.items()}


def means(losses: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """(R,) means of (M,) losses over the rows that they are of."""
    count = torch.bincount(of)
    return torch.zeros(len(count), device=losses.device).index_add(0, of, losses) / count
