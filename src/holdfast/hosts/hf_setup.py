"""What is settled before a trainer exists: its arguments, model, context and number of steps."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.engine.passing import pass_blocks
from holdfast.engine.ways import inner
from holdfast.errors import PlanError
from holdfast.hosts.hf_batches import text_rows
from holdfast.method import Method, Stage
from holdfast.plan import Host, Plan
from holdfast.services import Context


def fingerprint(model: Any) -> str:
    """Identity of a model's weights: a hash over the first numbers of every parameter, by name."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def by_name(kind: type, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by name, also for subclasses that pass *args on."""
    inits = (inspect.signature(vars(c)["__init__"]).parameters for c in kind.__mro__ if "__init__" in vars(c))
    names = next(list(p)[1:] for p in inits if "model" in p)
    return dict(zip(names, args, strict=False)) | kwargs


def is_sft(kind: type) -> bool:
    return any(c.__module__ == "trl.trainer.sft_trainer" for c in kind.__mro__)


def default_args(kind: type, model: Any) -> Any:
    if is_sft(kind):
        from trl import SFTConfig

        name = model if isinstance(model, str) else inner(model).config._name_or_path
        return SFTConfig(f"{str(name).rstrip('/').split('/')[-1]}-SFT")
    if kind.__module__ == "transformers.trainer":
        from transformers import TrainingArguments

        return TrainingArguments("tmp_trainer")
    raise PlanError(f"with_plan({kind.__name__}) was given no args.", "Pass args=, such as DPOConfig('out').")


def load_named(kind: type, given: dict[str, Any]) -> None:
    """Load a model given by name as TRL does (fp32 unless asked otherwise), and SFTTrainer's default tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, options, more = given.get("model"), given["args"], {}
    if isinstance(model, str):
        given["args"] = options = copy.copy(options)
        more = dict(getattr(options, "model_init_kwargs", None) or {})
        options.model_init_kwargs = None  # used here
        more.setdefault("trust_remote_code", getattr(options, "trust_remote_code", False))
        if given.get("quantization_config") is not None:
            more["quantization_config"] = given.pop("quantization_config")
        given["model"] = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **more})
    if given.get("model") is None:
        raise PlanError(f"with_plan({kind.__name__}) was given no model.", "Pass model=, not model_init=.")
    if given.get("processing_class") is None and is_sft(kind):
        name = model if isinstance(model, str) else inner(model).config._name_or_path
        remote = getattr(options, "trust_remote_code", False)
        given["processing_class"] = AutoTokenizer.from_pretrained(
            name, revision=more.get("revision", "main"), trust_remote_code=remote
        )


def settle_tokenizer(given: Mapping[str, Any]) -> None:
    """What SFTTrainer does to the tokenizer when it is built, done now: methods write rows with it before that."""
    options, processor = given["args"], given.get("processing_class")
    template, eos = getattr(options, "chat_template_path", None), getattr(options, "eos_token", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    if processor is not None and template and is_template(template):
        processor.chat_template = Path(template).read_text(encoding="utf-8")
    if tokenizer is not None and eos and eos in tokenizer.get_vocab():  # else SFTTrainer says so
        tokenizer.eos_token = eos


def is_template(path: str) -> bool:
    """True for a template's own file; TRL takes everything else for a tokenizer to take the template from."""
    return os.path.isfile(path) and path.endswith((".jinja", ".j2"))


def quantised(model: Any) -> bool:
    return any(getattr(model, n, False) for n in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"))


def host_of(kind: type, options: Any, model: Any) -> Host:
    packing = bool(getattr(options, "packing", False) or getattr(options, "padding_free", False))
    return Host(
        kind.__name__, packing, getattr(options, "deepspeed_plugin", None) is not None, quantised(model),
        options.weight_decay,
    )  # fmt: skip


def place(model: Any, options: Any, sharded: bool) -> None:
    """Put the model where it will train, so that what is prepared from it lies there too.

    A base that will be cut (`sharded`) may be larger than a device: its blocks pass through it while they are asked.
    """
    own = getattr(model, "hf_device_map", None) or quantised(model) or options.deepspeed_plugin
    if own or getattr(options, "place_model_on_device", None) is False:
        return
    if sharded:
        pass_blocks(model, options.device)
    else:
        model.to(options.device)


class _NoTokenizer:
    """Stands for a missing tokenizer and says so when a method wants it."""

    def __init__(self, host: str):
        self._host = host

    def __getattr__(self, name: str) -> Any:
        raise PlanError(
            f"A method of the plan writes rows of text, but {self._host} was given no tokenizer.",
            "Pass processing_class=tokenizer.",
        )

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.encode


def context_of(kind: type, plan: Plan, given: Mapping[str, Any]) -> Context:
    options, tokenizer = given["args"], given.get("processing_class")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    limit = int(getattr(inner(given["model"]).config.get_text_config(), "max_position_embeddings", None) or 1024)
    return Context(
        given["model"],
        _NoTokenizer(kind.__name__) if tokenizer is None else tokenizer,
        options.seed,
        text_rows(given.get("train_dataset")),
        most_steps(options, plan, given.get("train_dataset")),
        getattr(options, "max_length", None) or min(limit, 1024),
        Path.cwd(),
    )


def mixes(method: Method) -> bool:
    return type(method).data is not Method.data


def rows_a_batch(options: Any) -> int:
    """Rows that all processes together draw at once."""
    split = getattr(options.accelerator_config, "split_batches", False)
    return options.train_batch_size * (1 if split else max(1, options.world_size))


def rows_a_step(options: Any) -> int:
    return rows_a_batch(options) * options.gradient_accumulation_steps


def steps_of(options: Any, rows: int) -> int:
    """Optimizer steps of one epoch, counted as the trainer does."""
    each = rows_a_batch(options)
    batches = rows // each if options.dataloader_drop_last else math.ceil(rows / each)
    return max(1, math.ceil(batches / options.gradient_accumulation_steps))


def most_steps(options: Any, plan: Plan, dataset: Any) -> int:
    """An upper bound of the run's steps, 0 when unknown (a stream; rows that packing cuts or a method adds)."""
    if options.max_steps > 0:
        return options.max_steps
    grows = getattr(options, "packing", False) or any(mixes(m) for m in plan.active)
    if grows or not hasattr(dataset, "__len__"):
        return 0
    return math.ceil(steps_of(options, len(dataset)) * options.num_train_epochs)


def stage_folder(place: str, stage: Stage, stages: Sequence[Stage]) -> str:
    return place if stage == stages[-1] else os.path.join(place, f"stage-{stage.name}")
