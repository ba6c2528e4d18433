"""AdaLoRA: a low-rank adapter whose ranks go where they matter, until a budget is left.

    y = W x + s B (E * (A x)),   A (r, n) and B (m, r) random, E (r, 1) zero at the start;   s = lora_alpha / r
    loss += orth_reg_weight * mean over all A, B of |A A^T - I|_F, |B^T B - I|_F
    each step, of every entry, I = |p * gradient|; of an E that is 0, p = lr (ours), what a step of Adam would give it:
    I' = beta1 I' + (1 - beta1) I,   U = beta2 U + (1 - beta2) |I - I'|
    S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji),   s = I' U
    t <= tinit: all ranks;   then every `delta_t` steps the b largest S of all maps keep their E, the others get 0
    b = target + (r - target) (1 - (t - tinit) / (T - tfinal - tinit))^3 a map;   the last tfinal steps: b = target,
    and which ranks are left is settled

A rank without E may come back: its E has a gradient still, and counts as large as one step would make it; the paper's
formula would give it 0, at the start to all of them. Step 0 is the base. Layers, forward and export are PEFT's (its
tensors are masked, not cut). Its schedule is not used: it needs a call of its own after each step, sees gradients that
were clipped and weights that moved already, so that no E is 0 (here both are as before the step), is not in
checkpoints, and fails where target_r is r; and its term is lost in trainers that make their own loss.
tinit and tfinal are parts of the run here, and T its steps.
Cost: two numbers more for every entry of the adapter, one sort of all ranks at a choice.
Combine with: data and loss methods, WiSEFT and LiNeS (exact). Do not combine with: LoRA and its relatives, L2ToInit.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch

from holdfast.engine.shards import whole
from holdfast.errors import PlanError
from holdfast.method import Paper, Past, State, Steer, Term
from holdfast.methods.adapt._adapter import Adapter
from holdfast.services import Context, View

E = ".lora_E.default"


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Adapter):
    """Adaptive budget allocation (ICLR 2023), arXiv 2303.10512.

    Raises:
        PlanError: as LoRA; target_r outside of 1 to r, shares that leave no time to choose, betas outside of (0, 1).
    """

    r: int = 12  # PEFT's init_r
    lora_alpha: float = 32  # ours: as LoRA's
    target_r: int = 8  # PEFT: left on average
    tinit: float = 0.1  # ours: a part of the run; PEFT 0
    tfinal: float = 0.3  # ours: a part of the run; PEFT 0
    delta_t: int = 1  # PEFT
    beta1: float = 0.85  # PEFT
    beta2: float = 0.85  # PEFT
    orth_reg_weight: float = 0.5  # PEFT

    paper: ClassVar = Paper("Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "2303.10512",
                            "the id is from memory; it says nothing of forgetting")  # fmt: skip
    does: ClassVar = "trains a low-rank adapter and moves its ranks to where they matter"
    needs: ClassVar = frozenset({"gradients"})
    refuses: ClassVar = {"L2ToInit": "the size of AdaLoRA's change is not that of B A alone."}

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        for wrong, what in (
            (not 1 <= self.target_r <= self.r, f"target_r is {self.target_r}, but it lies between 1 and r = {self.r}"),
            (
                min(self.tinit, self.tfinal) < 0 or self.tinit + self.tfinal >= 1,
                "tinit and tfinal leave no time between",
            ),
            (self.delta_t < 1, f"delta_t is {self.delta_t}, but it is at least 1"),
            (not (0 < self.beta1 < 1 and 0 < self.beta2 < 1), "beta1 and beta2 lie between 0 and 1"),
            (self.orth_reg_weight < 0, f"orth_reg_weight is {self.orth_reg_weight}, but it is not negative"),
        ):
            if wrong:
                raise PlanError(f"AdaLoRA.{what}.", "See `holdfast methods AdaLoRA`.")

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        from peft import AdaLoraConfig
        from peft.tuners.tuners_utils import BaseTuner

        settled = self.peft_settings(model, init_r=self.r, target_r=self.target_r, total_step=max(1, ctx.total_steps))
        del settled["r"]
        model = self.wrapped(model, AdaLoraConfig(**settled, orth_reg_weight=0.0), ctx)
        for name, p in model.named_parameters():
            if ".ranknum." in name:  # a divisor, which PEFT marks for training and does not save
                p.requires_grad_(False)
        # PEFT's own forward makes its term for losses that a trainer makes, and fails on weights that are cut
        model.base_model.forward = MethodType(BaseTuner.forward, model.base_model)
        return model

    def loss(self, view: View) -> Term | None:
        found = [whole(p) for n, p in view.params.items() if ".lora_A.default" in n]
        found += [whole(p).T for n, p in view.params.items() if ".lora_B.default" in n]
        if not self.orth_reg_weight or not found:
            return None
        with torch.autocast(view.logits.device.type, enabled=False):  # in bf16 a length of 1 is known to 1 in 256
            far = [torch.linalg.matrix_norm(a @ a.T - torch.eye(len(a), device=a.device)) for a in found]
        return Term(self.orth_reg_weight * torch.stack(far).mean())

    def steer(self, past: Past, state: State) -> Steer:
        new = {k: v for n, p in past.params.items() if ".lora_" in n for k, v in self._seen(n, p, past, state).items()}
        maps = [n.removesuffix(E) for n in past.params if n.endswith(E)]
        left = self.budget(past.step + 1, past.total, len(maps))
        settled = past.step + 1 > past.total - self._steps(self.tfinal, past.total)
        if left is None or not maps:
            return Steer(state={**new, "now": torch.tensor(False)})
        if settled and f"kept/{maps[0]}" in state:
            return Steer(state={**new, "now": torch.tensor(True)})
        scores = torch.stack([self._score(m, new) for m in maps])
        kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        kept[scores.flatten().argsort(descending=True, stable=True)[:left]] = True
        masks = {f"kept/{m}": k[:, None].contiguous() for m, k in zip(maps, kept.view_as(scores), strict=True)}
        return Steer(state={**new, **masks, "now": torch.tensor(True)})

    def _steps(self, share: float, total: int) -> int:
        return round(share * total)

    def budget(self, t: int, total: int, maps: int) -> int | None:
        """How many ranks of all maps are left after step `t` (from 1) of `total`; None: nothing is chosen there."""
        first, last = self._steps(self.tinit, total), total - self._steps(self.tfinal, total)
        if t <= first and t < last:
            return None
        if t >= last:
            return self.target_r * maps
        if t % self.delta_t:
            return None
        return int((self.target_r + (self.r - self.target_r) * (1 - (t - first) / (last - first)) ** 3) * maps)

    def _seen(self, name: str, p: torch.Tensor, past: Past, state: State) -> State:
        """The running importance of each entry of a parameter, and how unsure it is."""
        grad = past.grads[name] if name in past.grads else torch.zeros_like(p)
        size = p.abs().float()
        if name.endswith(E):  # ours, for a rank that was taken away or did not begin yet: else its I would be 0
            size = torch.where(size == 0, past.learning_rate, size)
        now = size * grad.abs().float()
        before = state.get(f"importance/{name}", torch.zeros_like(now))
        importance = self.beta1 * before + (1 - self.beta1) * now
        unsure = self.beta2 * state.get(f"unsure/{name}", torch.zeros_like(now))
        unsure = unsure + (1 - self.beta2) * (now - importance).abs()
        return {f"importance/{name}": importance, f"unsure/{name}": unsure}

    def _score(self, name: str, seen: State) -> torch.Tensor:
        """(r,) S of the ranks of one map."""
        keys = {x: f"{name}.lora_{x}.default" for x in "EAB"}
        s = {x: seen[f"importance/{k}"] * seen[f"unsure/{k}"] for x, k in keys.items() if f"unsure/{k}" in seen}
        return s["E"][:, 0] + sum(s[x].mean(at) for x, at in (("A", 1), ("B", 0)) if x in s)

    def touches(self, name: str, param: torch.Tensor) -> bool:
        return name.endswith(E)

    def update(self, name: str, step: torch.Tensor, param: torch.Tensor, state: State) -> torch.Tensor:
        kept = state.get(f"kept/{name.removesuffix(E)}")
        if kept is None or not bool(state["now"]):
            return step
        return torch.where(kept, step, -param)
