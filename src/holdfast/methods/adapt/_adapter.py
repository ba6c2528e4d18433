"""What LoRA and its relatives share: rank, scale, which maps get an adapter, and PEFT's wrapper around the model."""

import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.pytorch_utils import Conv1D

from holdfast.errors import PlanError
from holdfast.method import Method, State, canonical
from holdfast.services import Context

# a weight that is given to a function by the code of the layer around it
READS = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight(?:\.\w+\([^()]*\))?\s*[,)@]")
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """A method that trains PEFT's low-rank layers beside frozen linear maps; subclasses say how they start.

    Raises:
        PlanError: r < 1, target_modules that match no linear layer or one beside which nothing can stand, or a base
            that is itself a merged adapter and has no folder of its own.
    """

    r: int = 16  # usual for language models; PEFT's own default is 8
    lora_alpha: float = 32  # ours: 2 r
    lora_dropout: float = 0.0  # PEFT
    target_modules: str | tuple[str, ...] = "all-linear"

    wraps: ClassVar = True

    def check(self, ctx: Context) -> None:
        if self.r < 1:
            raise PlanError(f"{self.name}.r is {self.r}, but a rank is at least 1.", "Try r: 16.")
        if self.target_modules != "all-linear":
            apart = unfit(ctx.model)
            for name in filter(self.takes, apart):
                what = f"{self.name}.target_modules takes {name}, but {apart[name]}."
                raise PlanError(what, _cure(ctx.model, apart))

    def takes(self, name: str) -> bool:
        """Whether the chosen modules hold `name`, as PEFT reads them."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in self.target_modules)

    def maps(self, model: Any) -> dict[str, Any]:
        """The linear maps of an untouched model that get an adapter, by name."""
        head, apart = model.get_output_embeddings(), unfit(model)
        every = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
        if self.target_modules == "all-linear":
            return {n: m for n, m in every.items() if m is not head and n not in apart}
        return {n: m for n, m in every.items() if self.takes(n)}

    def peft_settings(self, model: Any, **more: Any) -> dict[str, Any]:
        """The arguments of PEFT's configuration; `more` goes before."""
        apart = unfit(model) if self.target_modules == "all-linear" else {}
        alpha = int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha
        return {
            "r": self.r,
            "lora_alpha": alpha,  # PEFT says int, but scales by any number
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules
            if isinstance(self.target_modules, str)
            else list(self.target_modules),
            "exclude_modules": sorted(apart) or None,
            "task_type": "CAUSAL_LM",
            **more,
        }

    def wrapped(self, model: Any, config: Any, ctx: Context) -> Any:
        """PEFT's model around `model`, its start drawn with the seed of the run."""
        from peft import get_peft_model

        name = str(getattr(model, "name_or_path", ""))
        if name and (Path(name) / "adapter_config.json").is_file():
            raise PlanError(
                f"{self.name} would train on {name} merged into its base, which no folder holds: the new adapter "
                f"would name {name} as its base, and plain PEFT would leave that one out.",
                "Save the merged model with save_pretrained, load that folder, and train on it.",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)  # the same start whatever ran before
            try:
                return get_peft_model(model, config)
            except ValueError as e:
                raise PlanError(f"{self.name} finds nothing to adapt: {e}", _cure(model, unfit(model))) from e

    def adapt(self, model: Any, ctx: Context, state: State) -> Any:
        from peft import LoraConfig

        return self.wrapped(model, LoraConfig(**self.peft_settings(model)), ctx)


def layers(model: Any) -> dict[str, Any]:
    """The low-rank layers of a wrapped model, by the names that their maps had in the plain one."""
    found = {n: m for n, m in model.named_modules() if "default" in getattr(m, "lora_A", ())}
    return {canonical(n): m for n, m in found.items()}


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
