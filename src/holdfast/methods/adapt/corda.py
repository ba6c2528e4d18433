"""CorDA: a low-rank adapter that starts at those parts of each weight that some text uses least, or most.

    C = mean X^T X + damp I,   X the inputs of the map W on that text;   W C = U S V^T,   W = sum_i s_i u_i v_i^T C^-1
    kpm (knowledge-preserved): the r smallest s_i on general text;   ipm (instruction-previewed): the r largest on the
    task's rows;   B0 = U_r (S_r / s)^(1/2),   A0 = (S_r / s)^(1/2) V_r^T C^-1,   s = lora_alpha / r
    y = W x + s (B A - B0 A0) x,   A and B begin at A0 and B0

The paper trains s B A beside the frozen residual W - s B0 A0. That is the same function; here W stays the base's and
- s B0 A0 is the second half of an adapter of rank 2 r, which never trains. So the base is one switch away, step 0 is
the base up to rounding (in bf16 too, where the paper's residual would be rounded), and plain PEFT loads the result.
Damping and SVD are PEFT's. Its calibration is not used: it breaks on batches and counts padding. Here rows run alone,
each scaled by its largest |x|, where the paper's code takes the size of the largest x.
Weight decay pulls A and B to 0 and not to A0 and B0, so it takes those parts out of the weight: leave it at 0.
Cost: a pass over `samples` rows for every 8 GB of n x n numbers a map, one SVD a map; then that of a LoRA of rank 2 r,
half of it frozen. It protects by its start alone: training may turn A and B anywhere.
Combine with: every data and loss method, WiSEFT and LiNeS (exact), Replay. Do not combine with: LoRA, EVA.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Paper, State, canonical
from holdfast.methods.adapt._adapter import Adapter, layers
from holdfast.methods.adapt._inputs import covariances, general_rows, task_rows
from holdfast.methods.adapt._matrices import of_few_bits
from holdfast.methods.data.replay import GENERAL
from holdfast.services import Context


@dataclass(frozen=True, kw_only=True)
class CorDA(Adapter):
    """Context-oriented decomposition adaptation (NeurIPS 2024), arXiv 2406.05223.

    Raises:
        PlanError: as LoRA; an unknown mode, a base of few bits, a rank above that of a map, no text of the task (ipm).
    """

    r: int = 16  # ours; the paper's 128 is for maps of 4096 and more
    lora_alpha: float = 16  # README of the paper's code: r, so that s = 1
    corda_method: str = "kpm"  # ours: the one that protects; PEFT's default is ipm
    sources: tuple[str, ...] = GENERAL  # of kpm; the paper: questions and answers of what is to be kept
    samples: int = 256  # the paper
    max_tokens: int = 256  # ours; the paper 2048

    paper: ClassVar = Paper("CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for "
                            "Task-Aware Parameter-Efficient Fine-tuning", "2406.05223",
                            "its tables were not verified")  # fmt: skip
    does: ClassVar = "trains a low-rank adapter that starts at what general text uses least of each weight"

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if self.corda_method not in ("kpm", "ipm"):
            raise PlanError(f"CorDA.corda_method is {self.corda_method!r}.", "Use 'kpm' or 'ipm'.")
        if self.samples < 1 or self.max_tokens < 2:
            raise PlanError("CorDA needs samples of at least 1 and max_tokens of at least 2.", "Mend them.")
        if self.corda_method == "kpm" and not self.sources:
            raise PlanError("CorDA.sources is empty, so nothing says what is to be kept.", "Name files, or use 'ipm'.")
        for name, m in self.maps(ctx.model).items():
            if of_few_bits(m):
                raise PlanError(f"CorDA decomposes plain weights, but {name} has few bits.", "Load it unquantised.")
            if self.r > min(m.weight.shape):
                what = f"CorDA.r is {self.r}, but {name} has {min(m.weight.shape)} directions."
                raise PlanError(what, "Use a lower r.")

    def prepare(self, ctx: Context) -> State:
        """A0 (r, n) and B0 (m, r) of every map, by its name."""
        if self.corda_method == "ipm":
            rows = task_rows(ctx, self.name, self.samples, self.max_tokens)
        else:
            rows = general_rows(ctx, self.name, self.sources, self.samples, self.max_tokens)
        maps, state = self.maps(ctx.model), {}
        for name, covariance in covariances(ctx, maps, rows, self.name):
            state[f"A/{name}"], state[f"B/{name}"] = self.parts(maps[name], covariance)
        return state

    def parts(self, module: Any, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A0 (r, n) and B0 (m, r) of one map, whose product times s is the sum of the chosen parts of its weight."""
        from peft.tuners.lora.corda import collect_eigens_for_layer

        module.covariance_matrix = covariance  # where PEFT looks for it
        try:
            eigens = collect_eigens_for_layer(module, None)  # pyright: ignore[reportArgumentType]
        finally:
            del module.covariance_matrix
        chosen = slice(-self.r, None) if self.corda_method == "kpm" else slice(self.r)
        root = (eigens.S_WC[chosen] * self.r / self.lora_alpha).sqrt()
        u, v = (t[:, chosen].to(root) for t in (eigens.U_WC, eigens.V_WC))
        return (v * root).T.contiguous(), (u * root).contiguous()

    @torch.no_grad()
    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        from peft import LoraConfig

        settled = self.peft_settings(model, r=2 * self.r)
        settled["lora_alpha"] *= 2  # the same s
        model = self.wrapped(model, LoraConfig(**settled), ctx)
        for name, module in layers(model).items():
            a, b = state[f"A/{name}"], state[f"B/{name}"]
            module.lora_A["default"].weight.copy_(torch.cat([a, a]))
            module.lora_B["default"].weight.copy_(torch.cat([b, -b], 1))
        return model

    def entries(self, name: str, param: torch.Tensor, state: State, step: int) -> torch.Tensor | None:
        """The first half of the ranks trains; the second is what the adapter began with, taken away."""
        if ".lora_" not in name:
            return None
        mask = torch.zeros_like(param, dtype=torch.bool)
        (mask if ".lora_A." in canonical(name) else mask.T)[: self.r] = True
        return mask
