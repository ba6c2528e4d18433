"""What a plan and a trainer's arguments cannot do together, said before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.engine.forward import inner
from holdfast.errors import PlanError
from holdfast.plan import Plan

ONLY_WITH_LOSS = ("data", "batch", "token_weight", "loss", "stages")


def refuse(kind: type, plan: Plan, given: Mapping[str, Any], ours: bool) -> None:
    """Raise PlanError for the first argument of the trainer that a plan cannot live with."""
    own_loss = next((m for m in plan.active if not ours and set(ONLY_WITH_LOSS) & set(m.sites())), None)
    if own_loss:
        raise PlanError(
            f"{own_loss.name} changes the training loss or its data, but {kind.__name__} has a loss of its own.",
            f"Use it with SFTTrainer; {kind.__name__} takes methods that freeze, wrap, change steps or merge.",
        )
    for wrong, what, cure in (*_wrong_args(given), *(_wrong_losses(given) if ours else ())):
        if wrong:
            raise PlanError(f"{kind.__name__} with a plan cannot use {what}.", cure)
    gradients = next((m for m in plan.active if "grad" in m.sites()), None)
    if gradients and given["args"].fp16:
        raise PlanError(
            f"{gradients.name} changes gradients, but {kind.__name__} scales them under fp16.",
            "Set bf16=True instead.",
        )


def _wrong_args(given: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    options, model = given["args"], given["model"]
    deepspeed = getattr(options, "deepspeed_plugin", None)
    adapter = given.get("peft_config") is not None or hasattr(model, "get_base_model")
    yield (
        adapter,
        "another adapter: the plan decides what trains",
        "Pass the base model and put LoRA into the plan.",
    )
    yield (
        options.n_gpu > 1,
        "nn.DataParallel, which several visible GPUs in one process mean",
        "Start it with torchrun or accelerate launch, or show it one GPU.",
    )
    yield options.auto_find_batch_size, "auto_find_batch_size, which starts the run anew", "Set it to False."
    yield options.fsdp, "FSDP, which cuts the weights the plan works on", "Use DDP."
    yield (
        getattr(options, "parallelism_config", None) is not None,
        "tensor, context or sequence parallelism, which cut its rows",
        "Use DDP.",
    )
    yield (
        deepspeed is not None and deepspeed.zero_stage == 3,
        "DeepSpeed ZeRO-3, which cuts the weights the plan works on",
        "Use ZeRO-2 or DDP.",
    )
    yield (
        inner(model).config.is_encoder_decoder if hasattr(inner(model), "config") else True,
        "a model that is no causal language model",
        "Use one loaded with AutoModelForCausalLM.",
    )


def _wrong_losses(given: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    options = given["args"]
    yield (
        given.get("compute_loss_func"),
        "compute_loss_func, because the plan makes the loss",
        "Leave it out.",
    )
    yield (
        options.label_smoothing_factor,
        "label_smoothing_factor, because the plan makes the loss",
        "Set it to 0.",
    )
    yield (
        getattr(options, "loss_type", None) not in (None, "nll"),
        f"loss_type={getattr(options, 'loss_type', None)!r}, because the plan makes the loss",
        "Leave it out; DFT() in the plan is the same loss as 'dft'.",
    )
