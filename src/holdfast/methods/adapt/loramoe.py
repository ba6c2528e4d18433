"""LoRAMoE (experimental): several low-rank experts with a router beside every map of the feed-forward nets.

    w = softmax(G x),   y = W x + alpha / r sum_i w_i B_i (A_i x),   B = 0 at the start, all experts run for each token
    Q_is = sum of w_i over the answer's tokens of row s;   Z_is = (1 + delta) Q_is if expert i is of the row's kind,
    else (1 - delta) Q_is;   loss += beta mean_s mean_layers var_i(Z_is) / mean_i(Z_is)^2

The first half of the experts is of the kind "world knowledge", the second of "task". A row is of the first kind when
it comes from `knowledge`: by default every source of the mix but the task's own, such as those of Replay. A name that
fits no source is refused.
The term is 0 where Z is the same for all experts, and there the experts of a row's kind have (1 - delta) / (1 + delta)
times the weight of the others: the halves only change their names.
Experimental: the paper's term is a variance over all experts and rows of a batch, which depends on how a step is cut
and on the rows' lengths; here it is taken over the experts of each row, and rows are averaged. Also not as there: only
the answer's tokens are counted (the official code adds up padding too). beta and delta are the paper's from memory;
the script that was released sets both to 0. What is said of knowledge that is kept was not verified.
The router stays at inference, so it cannot be merged: `holdfast.load` loads what is exported. Step 0 is the base.
Cost: experts * r (m + n) + experts * n numbers a map, and as many products for each token.
Combine with: Replay, KLToBase, ICLAnchor. Do not combine with: LoRA, what compares weights with the base's.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from holdfast.data.mix import Mix, names_of
from holdfast.engine.pack import TokenRow
from holdfast.engine.replaced import Replaced, hand_out
from holdfast.engine.ways import inner
from holdfast.errors import PlanError, suggest
from holdfast.method import Method, Paper, Term
from holdfast.methods.adapt._parts import FEED_FORWARD, is_map, part_of
from holdfast.services import Context, State, View

ROUTED = "routed"  # what the maps hand out, (B, L, experts)
LISTED = re.compile(r"experts?\.\d+\.")  # in the name of a map: one of several, each of which sees some tokens alone


@dataclass(frozen=True, kw_only=True)
class LoRAMoE(Method):
    """LoRAMoE (ACL 2024), arXiv 2312.09979; experimental.

    Raises:
        PlanError: values without meaning, or a model without maps of feed-forward nets or with lists of experts.
    """

    r: int = 4  # official script
    lora_alpha: float = 32  # official script
    experts: int = 8  # official script
    lora_dropout: float = 0.05  # official script
    weight: float = 0.1  # beta; the paper's from memory, 0 in the official script
    delta: float = 0.1  # the paper's from memory, 0 in the official script
    knowledge: tuple[str, ...] = ()  # sources of the mix; ours: (), all but the task's own

    paper: ClassVar = Paper(
        "LoRAMoE: Alleviating World Knowledge Forgetting in Large Language Models via MoE-Style Plugin",
        "2312.09979",
        note="beta, delta and what the paper divides by were not verified",
    )
    does: ClassVar = "trains several low-rank experts with a router, balanced by the kind of row (experimental)"
    strengths: ClassVar = ("weight",)
    wraps: ClassVar = True
    whole_rows: ClassVar = True

    def check(self, ctx: Context) -> None:
        for wrong, what in (
            (self.r < 1, f"r is {self.r}, but a rank is at least 1"),
            (self.experts < 2 or self.experts % 2, f"experts is {self.experts}, but two kinds share an even number"),
            (not 0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}, but it is a part below 1"),
            (self.weight < 0, f"weight is {self.weight}, but it is not negative"),
            (not 0 <= self.delta < 1, f"delta is {self.delta}, but it is a part below 1"),
        ):
            if wrong:
                raise PlanError(f"LoRAMoE.{what}.", "See `holdfast methods LoRAMoE`.")
        core = inner(ctx.model)
        taken = [name for name, m in core.named_modules() if self._takes(core, name, m)]
        routed = next((n for n in taken if LISTED.search(n)), None)
        if routed:
            what = f"LoRAMoE looks at every token in every map, but {routed} is of one expert, which sees some alone."
            raise PlanError(what, "Use LoRA.")
        if not taken:
            what = f"LoRAMoE finds no maps of feed-forward nets in {type(core).__name__} (fused or unusually named)."
            raise PlanError(what, "Use LoRA.")

    def check_mix(self, mix: Mix, ctx: Context) -> None:
        every = [("task", mix.task), *((s.name, s.rows) for s in mix.sources)]
        if self.weight and not mix.sources and not self.knowledge:
            said = "all rows are the task's, so no experts are set apart for others: put Replay into the plan"
            ctx.notes.append(f"LoRAMoE shares experts out by the kind of row, and {said}")
        if not self.knowledge or any(callable(rows) for _, rows in every):
            return  # of rows that are still to be read nobody knows the names
        labels = dict.fromkeys(label for _, rows in every for label in names_of(rows))
        wrong = [s for s in self.knowledge if not any(fits(label, s) for label in labels)]
        if wrong:
            what = f"LoRAMoE.knowledge names {wrong[0]!r}, and the sources of the mix are {', '.join(labels)}."
            raise PlanError(what, suggest(wrong[0], tuple(labels)))

    def _takes(self, model: Any, name: str, module: nn.Module) -> bool:
        return part_of(name) in FEED_FORWARD and is_map(model, name, module)

    def replace(self, name: str, module: nn.Module, ctx: Context, state: State) -> Replaced | None:
        return Experts(module, self) if self._takes(ctx.model, name, module) else None

    def loss(self, view: View) -> Term | None:
        each = view.inside(ROUTED, "task") if self.weight else []
        if not each or not len(each[0]):
            return None
        found = (view.packed.rows[n] for n in sorted({*view.packed.row.tolist()}))
        rows = [r for r in found if r.owner == "task"]
        kinds = torch.tensor([self.is_knowledge(r) for r in rows], device=each[0].device)
        of = view.rows("task")
        value = torch.stack([imbalance(w, of, kinds, self.delta) for w in each]).mean(0)
        return Term(self.weight * value, "task", per="row")

    def is_knowledge(self, row: TokenRow) -> bool:
        """Whether a row is of the kind of the first half of the experts."""
        if not self.knowledge:
            return not row.of_task
        return any(fits(row.source, s) for s in self.knowledge)


def fits(source: str, name: str) -> bool:
    """Whether a row's source is the one of that name, or one of its files."""
    return source == name or source.startswith(f"{name}:")


class Experts(Replaced):
    """A frozen linear map with low-rank experts beside it."""

    def __init__(self, original: nn.Module, method: LoRAMoE):
        super().__init__(original)
        assert isinstance(original, nn.Linear)
        m, n, count, r = original.out_features, original.in_features, method.experts, method.r
        how: Any = {"dtype": original.weight.dtype, "device": original.weight.device}
        self.r, self.scaling = r, method.lora_alpha / r
        self.router = nn.Linear(n, count, bias=False, **how)
        self.a = nn.Parameter(torch.empty(count * r, n, **how))
        self.b = nn.Parameter(torch.zeros(m, count * r, **how))
        self.dropout = nn.Dropout(method.lora_dropout)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as PEFT's A

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        routed = self.router(x).softmax(-1)
        hand_out(ROUTED, routed)
        low = linear(self.dropout(x), self.a)
        low = (low.unflatten(-1, (-1, self.r)) * routed[..., None].to(low.dtype)).flatten(-2)
        return self.base_layer(x) + self.scaling * linear(low, self.b)


def imbalance(routed: torch.Tensor, of: torch.Tensor, kinds: torch.Tensor, delta: float) -> torch.Tensor:
    """(R,) squared coefficient of variation of Z over the experts, for each row.

    routed: (M, N) weights at the scored positions. of: (M,) the row of each. kinds: (R,) whether a row is knowledge.
    """
    sums = torch.zeros(len(kinds), routed.shape[1], device=routed.device).index_add(0, of, routed.float())
    first = torch.arange(routed.shape[1], device=routed.device) < routed.shape[1] // 2
    z = torch.where(first[None] == kinds[:, None], 1 + delta, 1 - delta) * sums
    return z.var(-1, correction=0) / z.mean(-1).square()
