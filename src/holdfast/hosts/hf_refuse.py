"""What a plan and a trainer's arguments cannot do together, said before anything is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from holdfast.engine.base import has_adapter
from holdfast.engine.replaced import replaced_in
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.hosts.eight_bits import DROPS
from holdfast.hosts.hf_setup import is_template, mixes
from holdfast.method import Method
from holdfast.plan import Plan
from holdfast.session import Session

ONLY_WITH_LOSS = ("data", "batch", "rollouts", "token_weight", "loss", "steer", "stages")
INSIDE_BACKWARD = ("lomo", "layerwise")  # optimizers that step while gradients are still being made


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
    for name, wrong, what, cure in _wrong_together(plan, given, ours):
        if wrong:
            raise PlanError(f"{name} {what.format(kind.__name__)}.", cure)
    version = fsdp_version(given["args"])
    if version:
        _refuse_fsdp(kind, plan, given["args"], ours, version)
    return bool(version)


def _first(plan: Plan, *sites: str) -> Method | None:
    """The first method at work at one of these sites."""
    return next((m for m in plan.active if set(sites) & set(m.sites())), None)


def _uses_gradients(method: Method) -> bool:
    """Whether it looks at gradients, or leaves a step without any."""
    return "gradients" in method.needs or method.skips_steps


def _wrong_together(plan: Plan, given: Mapping[str, Any], ours: bool) -> Iterator[tuple[str, Any, str, str]]:
    """(name of a method, whether it is wrong here, what is wrong with {} for the trainer, cure)."""
    options = given["args"]
    strategy = getattr(options, "train_sampling_strategy", "random")
    noise = ours and options.neftune_noise_alpha is not None
    optim = str(getattr(options.optim, "value", options.optim))
    if method := _first(plan, "replace"):
        what = "replaces modules, but nobody has tested that with the loss of {}"
        yield method.name, not ours, what, "Use SFTTrainer."
        what = "replaces modules, but {} under DeepSpeed saves and cuts weights in a way of its own"
        yield method.name, getattr(options, "deepspeed_plugin", None), what, "Use DDP."
    if method := _first(plan, "grad") or next((m for m in plan.active if _uses_gradients(m)), None):
        does = "changes" if "grad" in method.sites() else "drops" if method.skips_steps else "looks at"
        yield method.name, options.fp16, does + " gradients, but {} scales them under fp16", "Set bf16=True instead."
    if method := next((m for m in plan.active if mixes(m)), None):
        yield (
            method.name,
            strategy != "random",
            f"decides the order of the rows, but {{}} was asked for train_sampling_strategy={strategy!r}",
            "Leave train_sampling_strategy out.",
        )
    if method := _first(plan, "batch", "rollouts"):
        what = "exchanges rows of a batch, but {} would add NEFTune's noise by the batch's own shape"
        yield method.name, noise, what, "Leave neftune_noise_alpha out."
    if method := next((m for m in plan.active if m.trains_prompt), None):
        what = "reads the task behind a soft prompt, for which {}'s NEFTune noise is not defined"
        yield method.name, noise, what, "Leave neftune_noise_alpha out."
        metrics = given.get("compute_metrics") or given.get("preprocess_logits_for_metrics")
        what = "reads the task behind a soft prompt, which the logits that {} gives to compute_metrics leave out"
        yield method.name, metrics, what, "Leave compute_metrics out; evaluation gives the loss with the prompt."
    if method := next((m for m in plan.active if m.prefix), None):
        what = "reads the task behind keys and values of every layer, which the gradient checkpointing of {} drops"
        yield method.name, options.gradient_checkpointing, what, "Set gradient_checkpointing=False."
    if method := _first(plan, "stages"):
        what = "ends each stage with its last weights, but {} was asked for load_best_model_at_end"
        yield method.name, options.load_best_model_at_end, what, "Set it to False."
    if method := next((m for m in plan.active if type(m).settled is not Method.settled), None):
        what = "ends with an average along training, but {} was asked for load_best_model_at_end"
        yield method.name, options.load_best_model_at_end, what, "Keep one of them."
    if method := _first(plan, "grad", "entries", "steer", "update"):
        yield method.name, optim.endswith(INSIDE_BACKWARD), *_steps_early(f"optim={optim!r}")
    if method := _first(plan, "entries"):
        yield method.name, "8bit" in optim or "4bit" in optim, DROPS, "Use optim='adamw_torch_fused'."
    if method := _first(plan, "update", "merge"):
        yield method.name, optim.startswith("schedule_free"), *_two_weights(f"optim={optim!r}")


def _steps_early(optimizer: str) -> tuple[str, str]:
    what = f"changes gradients or steps, but {optimizer} takes its steps inside of the backward"
    return what, "Use optim='adamw_torch_fused'."


def _two_weights(optimizer: str) -> tuple[str, str]:
    what = f"changes weights after a step, but {optimizer} keeps others for training than it gives"
    return what, "Use optim='adamw_torch_fused'."


def refuse_optimizer(optimizer: Any, plan: Plan, deepspeed: bool) -> None:
    """Raise PlanError for a built optimizer that hides from the plan what a method of it must see."""
    name = type(optimizer).__name__
    steps, weights = _first(plan, "grad", "entries", "steer", "update"), _first(plan, "update", "merge")
    if steps and (name.lower().endswith("lomo") or "LayerWise" in name):
        raise PlanError(" ".join((steps.name, _steps_early(name)[0])) + ".", _steps_early(name)[1])
    if steps and not deepspeed and not isinstance(optimizer, torch.optim.Optimizer):
        raise PlanError(
            f"{steps.name} changes gradients or steps, but the steps of {name}, no torch.optim.Optimizer, are hidden.",
            "Use optim='adamw_torch_fused'.",
        )
    if weights and callable(getattr(optimizer, "eval", None)):
        raise PlanError(" ".join((weights.name, _two_weights(name)[0])) + ".", _two_weights(name)[1])


def refuse_built(trainer: Any, session: Session, name: str, ours: bool) -> None:
    """Raise PlanError for what only the built trainer, or the wrapped model, shows."""
    config = inner(session.model).config.get_text_config()
    cut = getattr(trainer.accelerator, "parallelism_config", None) or (trainer.is_fsdp_enabled > session.sharded)
    named = session.model.named_parameters()
    thawed = [n for n, p in named if ".lora_" in n and ".default" in n and not p.requires_grad]
    if thawed and not ours:
        raise PlanError(
            f"{name} switches adapters and makes them trainable again, but the plan freezes {thawed[0]}.",
            "Choose the layers with LoRA.target_modules (a regular expression) instead of Freeze.",
        )
    if cut:
        raise PlanError(
            f"{name} with a plan cannot use weights or rows that are cut over processes, except by FSDP2.",
            "Use FSDP2 or DDP.",
        )
    if session.sharded > trainer.is_fsdp_enabled:
        raise PlanError(
            f"{name} was asked for FSDP, but accelerate does not turn it on here, as it does for GPUs only.",
            "Leave fsdp out: then every process holds all weights (DDP).",
        )
    if ours and getattr(config, "output_router_logits", False):
        raise PlanError(
            f"{name} would add the model's load-balancing loss for experts, which the plan's loss leaves out.",
            "Set router_aux_loss_coef=0.0 (SFTConfig), or config.output_router_logits=False.",
        )
    again = (trainer.args.gradient_checkpointing_kwargs or {}).get(
        "use_reentrant"
    ) and trainer.args.gradient_checkpointing
    below = "replaced modules" if replaced_in(inner(session.model)) else "layers"
    whole = (
        not has_adapter(session.model) and session.stage.trains != "prompt"
    )  # trainers open embeddings below PEFT's
    if again and whole and not inner(session.model).get_input_embeddings().weight.requires_grad:
        raise PlanError(
            f"{name} with use_reentrant=True gives {below} above frozen embeddings no gradient.",
            "Set gradient_checkpointing_kwargs={'use_reentrant': False}, or train the embeddings.",
        )


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

    owner, replacer = _first(plan, "stages"), _first(plan, "replace")
    asks = next(
        (m for m in plan.active if {"rollouts"} & {*m.sites()} or "live_logits" in m.needs or m.holds_out), None
    )
    for wrong, what, cure in (
        (
            replacer,
            f"FSDP together with {replacer and replacer.name}, whose replaced modules were not tried",
            "Use DDP.",
        ),
        (version == 1, "FSDP1, which flattens the weights the plan works on", "Set fsdp_config={'version': 2}."),
        (not ours, "FSDP, because nobody has tested that with its own loss", "Use DDP."),
        (asks, f"FSDP together with {asks and asks.name}, which asks the model between steps", "Use DDP."),
        (
            owner,
            f"FSDP together with {owner and owner.name}, which trains in stages: weights are cut once",
            "Use DDP.",
        ),
        (
            on("cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING"),
            "cpu_ram_efficient_loading, which gives the base to the first process alone, but all prepare the plan",
            "Set it to False: weights read from safetensors in their own dtype are in a host's memory once.",
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
        replaced_in(inner(model)),
        "a model whose modules are replaced already",
        "Pass the base model; the plan puts its own modules in place.",
    )
    yield (
        options.n_gpu > 1,
        "nn.DataParallel, which several visible GPUs in one process mean",
        "Start it with torchrun or accelerate launch, or show it one GPU.",
    )
    template = getattr(options, "chat_template_path", None)
    yield (
        template and not is_template(template),
        f"chat_template_path={template!r}, because another tokenizer may bring tokens that the prepared base lacks",
        "Give a .jinja file, or call trl.clone_chat_template(model, tokenizer, ...) before.",
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
