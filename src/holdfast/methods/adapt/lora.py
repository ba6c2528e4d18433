"""LoRA: train a low-rank change beside every frozen linear map.

    y = W x + s B (A x),   A (r, n), B (m, r),   s = alpha / r   (rsLoRA: alpha / sqrt(r))

A starts random and B at zero, so step 0 is the base. DoRA (`use_dora`) also trains a length per output row.
The mathematics is PEFT's; this file only chooses.
Cost: r (m + n) trained numbers per matrix; the frozen base needs no gradient and no optimizer state.
Combine with: every data and loss method (the base is one switch away), WiSEFT and LiNeS (exact on the adapter).
Do not combine with: methods that train the model's own weights (HalfFineTune, OrthogonalSubspace).
LoRA alone does not protect: see the results page.

"all-linear" leaves out the head, and maps beside which nothing can stand: routers of experts that return more than the
product (Llama 4), grouped maps (DeepSeek V4), and weights that the layer's own code reads, perhaps in a fused kernel
(`out_proj` of Mamba and its relatives, `dt_proj` of Jamba), where an adapter would not be seen.
"""

import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context, State

# a weight that is given to a function by the code of the layer around it
READS = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight(?:\.\w+\([^()]*\))?\s*[,)@]")
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation (Hu et al. 2021), with rsLoRA and DoRA as options.

    Raises:
        PlanError: r < 1, target_modules that match no linear layer or one beside which nothing can stand, or a base
            that is itself a merged adapter and has no folder of its own.
    """

    r: int = 16  # usual for language models; PEFT's own default is 8
    lora_alpha: float = 32  # ours: 2 r
    lora_dropout: float = 0.0  # PEFT
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    paper: ClassVar = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
    does: ClassVar = "trains a small low-rank adapter and freezes the model's own weights"
    wraps: ClassVar = True

    @property
    def refuses(self):  # type: ignore[override]
        if not self.use_dora:
            return {}
        why = "DoRA's change of a weight is not s B A alone, so it can be neither scaled nor measured by B and A."
        return {"WiSEFT": why, "LiNeS": why, "L2ToInit": why}

    def check(self, ctx: Context) -> None:
        if self.r < 1:
            raise PlanError(f"LoRA.r is {self.r}, but a rank is at least 1.", "Try r: 16.")
        if self.target_modules != "all-linear":
            apart = unfit(ctx.model)
            for name in filter(self._takes, apart):
                raise PlanError(f"LoRA.target_modules takes {name}, but {apart[name]}.", _cure(ctx.model, apart))

    def _takes(self, name: str) -> bool:
        """Whether the chosen modules hold `name`, as PEFT reads them."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in self.target_modules)

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        from peft import LoraConfig, get_peft_model

        name = str(getattr(model, "name_or_path", ""))
        if name and (Path(name) / "adapter_config.json").is_file():
            raise PlanError(
                f"LoRA would train on {name} merged into its base, which no folder holds: the new adapter would name "
                f"{name} as its base, and plain PEFT would leave that one out.",
                "Save the merged model with save_pretrained, load that folder, and train on it.",
            )
        apart = unfit(model) if self.target_modules == "all-linear" else {}
        alpha = int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha
        config = LoraConfig(
            r=self.r,
            # PEFT says int, but scales by any number
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            exclude_modules=sorted(apart) or None,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)  # the same start whatever ran before
            try:
                return get_peft_model(model, config)
            except ValueError as e:
                raise PlanError(f"LoRA finds nothing to adapt: {e}", _cure(model, unfit(model))) from e


def unfit(model: Any) -> dict[str, str]:
    """Linear maps that no adapter can stand beside: name -> why."""
    out = {}
    for place, layer in model.named_modules():
        for name, m in layer.named_children():
            if isinstance(m, torch.nn.Linear) and (why := why_unfit(layer, name, m)):
                out[f"{place}.{name}".lstrip(".")] = why
    return out


def why_unfit(layer: Any, name: str, m: Any) -> str:
    """Why nothing can stand beside the linear map `m`, which is `name` in `layer`; "" where something can."""
    if name in _reads(type(layer)):
        return f"{type(layer).__name__} reads its weight itself, so that an adapter would not be seen"
    plain = type(m).forward is torch.nn.Linear.forward or m.weight.dtype not in PLAIN or m.weight.is_meta
    return "" if plain or _multiplies(m) else f"{type(m).__name__} gives something else than a plain product"


@cache
def _reads(layer: type) -> frozenset[str]:
    """Names of the maps whose weights the code of a layer reads itself; none where there is no code to read."""
    try:
        return frozenset(READS.findall(inspect.getsource(layer)))
    except (OSError, TypeError):
        return frozenset()


@torch.no_grad()
def _multiplies(m: Any) -> bool:
    """Whether a map with a forward of its own still gives W x + b."""
    x = torch.linspace(-1, 1, 2 * m.in_features, device=m.weight.device).view(2, -1).to(m.weight.dtype)
    try:
        y = m(x)
    except Exception:  # it wants other shapes
        return False
    z = torch.nn.functional.linear(x, m.weight, m.bias)
    return isinstance(y, torch.Tensor) and y.shape == z.shape and torch.allclose(y, z, rtol=0.1, atol=1e-3)


def _cure(model: Any, apart: dict[str, str]) -> str:
    """The names that target_modules may hold here."""
    head = model.get_output_embeddings()
    maps = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head} - set(apart)
    names = sorted({n.rsplit(".", 1)[-1] for n in maps} - {n.rsplit(".", 1)[-1] for n in apart})
    return f"Leave target_modules at all-linear, or take from {', '.join(names)}." if names else "Use full tuning."
