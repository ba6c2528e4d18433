"""AdamW of bitsandbytes with moments of 8 bits, as transformers makes it; those of embeddings stay in 32."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.errors import PlanError, RecipeError, pip_install
from holdfast.plan import Plan

DROPS = "drops the moments of entries that leave, but {} keeps those of many entries together, in a few bits"
NAMES = {"adamw_bnb_8bit": False, "paged_adamw_8bit": True}  # of transformers: whether moments lie in paged memory


def check_eight_bits(optim: str, plan: Plan) -> None:
    """Refuse an optimiser of bitsandbytes that is not there, or that a method cannot work with.

    Raises:
        HoldfastError: bitsandbytes is not installed, pages without a GPU, or a method that drops single moments.
    """
    if optim not in NAMES:
        return
    from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

    if not is_bitsandbytes_available():
        what = (
            f"training.optim {optim} needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer, which is not installed."
        )
        raise RecipeError(what, f"Run: {pip_install('bnb')}, or write adamw_torch_fused.")
    if NAMES[optim] and not torch.cuda.is_available():
        what = f"training.optim {optim} moves moments between a GPU and main memory, and torch sees no GPU."
        raise RecipeError(what, "Write adamw_bnb_8bit, or adamw_torch_fused.")
    chooses = next((m.name for m in plan.active if "entries" in m.sites()), None)
    if chooses:
        what = f"{chooses} {DROPS.format(f'training.optim {optim}')}."
        raise PlanError(what, "Write training.optim: adamw_torch_fused.")


def eight_bits(model: torch.nn.Module, groups: list[dict[str, Any]], optim: str, **settings: Any) -> Any:
    """The optimiser over `groups`; settings: lr, betas, eps."""
    from bitsandbytes.optim import AdamW

    keep_embeddings(model)
    return AdamW(groups, **settings, optim_bits=8, is_paged=NAMES[optim])


def keep_embeddings(model: torch.nn.Module) -> None:
    """Moments of embeddings in 32 bits. bitsandbytes notes that for all optimisers of the process, by their order."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.initialize()  # nothing of another model
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
