"""What a plan and a trainer's arguments cannot do together, said before anything is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.engine.forward import inner
from holdfast.errors import PlanError
from holdfast.plan import Plan

ONLY_WITH_LOSS = ("data", "batch", "token_weight", "loss", "stages")


def refuse(kind: type, plan: Plan, given: Mapping[str, Any], ours: bool) -> bool:
    """Raise PlanError for the first argument of the trainer that a plan cannot live with; whether it cuts weights."""
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
    version = fsdp_version(given["args"])
    if version:
        _refuse_fsdp(kind, plan, given["args"], ours, version)
    return bool(version)


def fsdp_version(options: Any) -> int:
    """1 or 2 where the trainer, or `accelerate launch` around it, cuts weights over processes; else 0."""
    if options.fsdp:
        return int((getattr(options, "fsdp_plugin_args", None) or {}).get("fsdp_version", 1))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return int(os.environ.get("FSDP_VERSION", "1"))
    return 0


def _refuse_fsdp(kind: type, plan: Plan, options: Any, ours: bool, version: int) -> None:
    given = getattr(options, "fsdp_plugin_args", None) or {}

    def on(name: str, variable: str) -> bool:
        return bool(given.get(name)) or os.environ.get(variable, "false").lower() in ("1", "true")

    owner = next((m for m in plan.active if "stages" in m.sites()), None)
    for wrong, what, cure in (
        (version == 1, "FSDP1, which flattens the weights the plan works on", "Set fsdp_config={'version': 2}."),
        (not ours, "FSDP, because nobody has tested that with its own loss", "Use DDP."),
        (owner, f"FSDP together with {owner and owner.name}, whose soft prompt stands outside of the cut", "Use DDP."),
        (
            on("cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING"),
            "cpu_ram_efficient_loading, because the plan is prepared on the whole base in every process",
            "Set it to False.",
        ),
        (
            on("cpu_offload", "FSDP_OFFLOAD_PARAMS"),
            "FSDP's cpu_offload, which keeps the weights on another device than what the plan prepared",
            "Set it to False.",
        ),
    ):
        if wrong:
            raise PlanError(f"{kind.__name__} with a plan cannot use {what}.", cure)


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
    yield (
        getattr(options, "parallelism_config", None) is not None,
        "tensor, context or sequence parallelism, which cut its rows",
        "Use DDP or FSDP2.",
    )
    yield (
        deepspeed is not None and deepspeed.zero_stage == 3,
        "DeepSpeed ZeRO-3, which cuts the weights the plan works on",
        "Use FSDP2, ZeRO-2 or DDP.",
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
