"""Every option of the trainers: with a plan it means what it means without one, or it is refused by name.

TABLE and ARGUMENTS name every field of SFTConfig and every argument of the trainers, so that a new release cannot add
one unseen. "equal" needs a run here, "refused" a refusal here; words after a colon say why there is none.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AttentionInterface,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from holdfast import Plan, with_plan
from holdfast import methods as hf
from holdfast.errors import HoldfastError, ModelError, PlanError
from holdfast.hosts import hf_agree
from holdfast.hosts.hf_noise import Noise
from holdfast.hosts.hf_setup import settle_tokenizer
from holdfast.method import Method
from test_hosts import FirstLayerOnly, LongestHalf, distance, weights_of
from test_shard import together
from tiny import TEMPLATE, build_model, build_tokenizer, ticket_rows

pytestmark = [pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")]

NO_EFFECT = {
    "the optimizer and its schedule stay the trainer's": "learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon",
    "logs": "logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica "
    "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "skip_memory_metrics",
    "a loss that is not finite stops a run with a plan": "logging_nan_inf_filter",
    "evaluation stays the trainer's": "eval_steps eval_delay per_device_eval_batch_size prediction_loss_only "
    "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
    "metric_for_best_model greater_is_better label_names fp16_full_eval",
    "files and uploads": "output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit "
    "enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision",
    "resuming (tests/test_hosts.py)": "resume_from_checkpoint ignore_data_skip "
    "restore_callback_states_from_checkpoint",
    "how torch computes, the plan's forward too": "tf32 full_determinism use_cpu",
    "how batches are fetched, not what is in them": "dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "dataset_num_proc",
    "how processes talk": "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_backend ddp_timeout local_rank",
    "for scripts, Trainer does not read it": "do_train do_eval do_predict",
    "hooks that look and change nothing": "debug",
    "how a model named by its path is loaded (tests/test_hosts.py)": "model_init_kwargs trust_remote_code",
    "no cache is used in training": "use_cache",
    "where activations wait for the backward; TRL stops without an accelerator": "activation_offloading",
    "kernels inside of layers; not installed here, compared before the first step of every run": "use_liger_kernel "
    "liger_kernel_config",
}  # fmt: skip
TABLE = {name: f"no effect: {why}" for why, names in NO_EFFECT.items() for name in names.split()} | {
    "per_device_train_batch_size": "equal",
    "num_train_epochs": "equal",
    "max_steps": "equal",
    "optim": "equal, refused",
    "gradient_accumulation_steps": "equal",
    "average_tokens_across_devices": "equal",
    "max_grad_norm": "equal",
    "label_smoothing_factor": "refused",
    "bf16": "equal",
    "fp16": "refused",  # with methods that change gradients; else it needs a GPU
    "bf16_full_eval": "equal",
    "activation_checkpointing": "equal",
    "activation_checkpointing_kwargs": "equal",
    "gradient_checkpointing": "equal",
    "gradient_checkpointing_kwargs": "equal, refused",
    "torch_compile": "equal",
    "torch_compile_backend": "equal",
    "torch_compile_mode": "equal: see torch_compile",
    "neftune_noise_alpha": "equal, refused",
    "torch_empty_cache_steps": "equal",
    "auto_find_batch_size": "refused",
    "include_num_input_tokens_seen": "equal",
    "eval_strategy": "equal",
    "eval_on_start": "equal",
    "load_best_model_at_end": "equal, refused",
    "seed": "equal",
    "data_seed": "equal",
    "accelerator_config": "equal",
    "parallelism_config": "refused",
    "dataloader_drop_last": "equal",
    "remove_unused_columns": "equal, refused",
    "train_sampling_strategy": "equal, refused",
    "length_column_name": "equal",
    "fsdp": "refused: FSDP1; FSDP2 is equal (tests/test_hosts.py, tests/test_fsdp.py)",
    "fsdp_config": "refused: FSDP1; FSDP2 is equal (tests/test_hosts.py, tests/test_fsdp.py)",
    "deepspeed": "refused: where it hides gradients or cuts weights (tests/test_hosts.py)",
    "router_aux_loss_coef": "equal, refused",
    "chat_template_path": "equal, refused",
    "dataset_text_field": "equal",
    "dataset_kwargs": "equal",
    "eos_token": "equal",
    "max_length": "equal",
    "truncation_mode": "equal",
    "shuffle_dataset": "equal",
    "packing": "equal, refused",
    "packing_strategy": "equal",
    "padding_free": "equal, refused",
    "pad_to_multiple_of": "equal",
    "eval_packing": "equal",
    "completion_only_loss": "equal",
    "assistant_only_loss": "equal",
    "loss_type": "equal, refused",
    "pad_token": "equal",
}
ARGUMENTS = {
    "model": "equal",
    "args": "equal",
    "data_collator": "equal, refused",
    "train_dataset": "equal, refused",
    "eval_dataset": "equal",
    "processing_class": "equal",
    "model_init": "refused",
    "compute_loss_func": "refused",
    "compute_metrics": "equal, refused",
    "callbacks": "equal",
    "optimizers": "equal",
    "optimizer_cls_and_kwargs": "equal",
    "preprocess_logits_for_metrics": "equal, refused",
    "quantization_config": "no effect: read where a model is named by its path (tests/test_four_bits.py)",
    "peft_config": "refused",
    "formatting_func": "equal",
}
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = build_tokenizer()
ROWS = ticket_rows()


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """Every `train` collects garbage; looking through all imported modules would be half of this file's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- data, models, collators


def pairs(**more: Any) -> Dataset:
    return Dataset.from_list([{"prompt": r.prompt, "completion": r.completion, **more} for r in ROWS])


def texts(column: str = "text") -> Dataset:
    return Dataset.from_list([{column: r.prompt + r.completion} for r in ROWS])


def chats() -> Dataset:
    said = [("user", r.prompt, "assistant", r.completion.strip()) for r in ROWS]
    return Dataset.from_list(
        [{"messages": [{"role": a, "content": b}, {"role": c, "content": d}]} for a, b, c, d in said]
    )


def tokens(whole: bool = False, **more: Callable[[list[int]], Any]) -> Dataset:
    """Tokenised rows; `whole` scores the prompt too; `more` are further columns, made from the ids."""
    out = []
    for r in ROWS:
        prompt = TOKENIZER(r.prompt)["input_ids"]
        answer = [*TOKENIZER(r.completion, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
        ids = prompt + answer
        labels = ids if whole else [-100] * len(prompt) + answer
        out.append({"input_ids": ids, "labels": labels, **{k: f(ids) for k, f in more.items()}})
    return Dataset.from_list(out)


def tokenizer(**changes: Any) -> Any:
    own = copy.deepcopy(TOKENIZER)
    for name, value in changes.items():
        setattr(own, name, value)
    return own


def collated(change: Callable[[Any], Any], **changes: Any) -> Callable[[], dict[str, Any]]:
    """Keywords of a trainer with a collator that pads and then changes the batch."""

    def given() -> dict[str, Any]:
        pad = DataCollatorForSeq2Seq(tokenizer(**changes))

        def collate(rows: Any) -> Any:
            batch = pad(rows)
            change(batch)
            return batch

        return {"data_collator": collate}

    return given


SIZES = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def counted(batch: Any) -> torch.Tensor:
    """Positions from 0 for a padded batch."""
    return torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])


def gpt2() -> Any:
    torch.manual_seed(0)
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **off, **SIZES)).eval()


def experts() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES, **LAYERS)).eval()


def mamba() -> Any:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **SIZES)).eval()


def sliding() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES, **LAYERS)).eval()


def uncounted() -> Any:
    """A model whose loss takes no count of the step's tokens: trainers then take the mean of means."""
    model = build_model()
    model.accepts_loss_kwargs = False
    return model


def without_mask() -> Any:
    """A model whose own attention also looks ahead."""

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("looks_ahead", attend)
    model = build_model()
    model.config._attn_implementation = "looks_ahead"
    return model


class Counts(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def given(**values: Any) -> Callable[[], dict[str, Any]]:
    """Keywords of a trainer; callables make theirs anew for every trainer."""
    return lambda: {k: v() if callable(v) else v for k, v in values.items()}


def own_optimizer() -> dict[str, Any]:
    model = build_model()
    return {"model": model, "optimizers": (torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5), None)}


def metrics() -> dict[str, Any]:
    return {
        "eval_dataset": pairs(),
        "compute_metrics": lambda p: {"mean": float(p.predictions.mean())},
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }


# ---- equal


@dataclass(frozen=True)
class Case:
    """Options and keywords of a trainer; `near` is how far the weights may be apart, `differs` from the default's."""

    options: Mapping[str, Any] = field(default_factory=dict)
    given: Callable[[], dict[str, Any]] = dict
    model: Callable[[], Any] = build_model
    kind: type = SFTTrainer
    near: float = 2e-4
    differs: bool = False


SGD = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}  # the step is in proportion to the gradient
EVALS = {"eval_strategy": "steps", "eval_steps": 2}
NEFTUNE = {"neftune_noise_alpha": 5.0}
EQUAL: dict[str, Case] = {
    "default": Case(),
    "Trainer": Case(kind=Trainer),
    "plain arguments": Case(given=lambda: {"args": TrainingArguments}),
    "one batch a step": Case({"gradient_accumulation_steps": 1}, differs=True),
    "epochs": Case({"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 5}),
    "drop last": Case({"dataloader_drop_last": True, "per_device_train_batch_size": 5, "max_steps": 5}),
    "seeds": Case({"seed": 3, "data_seed": 4}, differs=True),
    "per process": Case({"average_tokens_across_devices": False}),
    "no clipping": Case({"max_grad_norm": 0.0}),
    "adafactor": Case({"optim": "adafactor"}, differs=True),
    "sgd": Case(SGD, differs=True),
    "own optimizer": Case(given=own_optimizer, differs=True),
    "optimizer class": Case(given=given(optimizer_cls_and_kwargs=lambda: (torch.optim.SGD, {"lr": 0.3}))),
    "callbacks": Case(given=lambda: {"callbacks": [Counts()]}),
    "bf16": Case({**SGD, "bf16": True}, near=3e-3),
    "bf16 in evaluation": Case({**EVALS, "bf16_full_eval": True}, given(eval_dataset=pairs)),
    "keeps everything": Case({"gradient_checkpointing": False}),
    "reentrant": Case({"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "selective": Case({"gradient_checkpointing_kwargs": {"selective": True}}),
    "every second layer": Case(
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    ),
    "empties the cache": Case({"torch_empty_cache_steps": 1}),
    "counts tokens": Case({"include_num_input_tokens_seen": "non_padding"}),
    "counts all tokens": Case({"include_num_input_tokens_seen": "all"}),
    "by length": Case({"train_sampling_strategy": "group_by_length"}, differs=True),
    "by length, told": Case(
        {"train_sampling_strategy": "group_by_length", "length_column_name": "size"},
        lambda: {"train_dataset": tokens(size=lambda ids: 100 - len(ids))},
        kind=Trainer,
    ),
    "balanced": Case({"train_sampling_strategy": "batch_rebalance"}, differs=True),
    "accumulation by accelerate": Case(
        {"gradient_accumulation_steps": 1, "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}
    ),
    "evaluates": Case({**EVALS, "eval_on_start": True}, given(eval_dataset=pairs)),
    "metrics": Case(EVALS, metrics),
    "best": Case(
        {**EVALS, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2},
        given(eval_dataset=pairs),
    ),
    "packing": Case({"packing": True, "max_length": 64}, differs=True),
    "packing, split": Case({"packing": True, "packing_strategy": "bfd_split", "max_length": 16}, differs=True),
    "packing, wrapped": Case({"packing": True, "packing_strategy": "wrapped", "max_length": 32}, differs=True),
    "packing, wrapped and flat": Case(
        {"packing": True, "packing_strategy": "wrapped", "max_length": 32, "padding_free": True}
    ),
    "packs for evaluation": Case({**EVALS, "eval_packing": True, "max_length": 64}, given(eval_dataset=pairs)),
    "packs for training only": Case(
        {**EVALS, "packing": True, "eval_packing": False, "max_length": 64}, given(eval_dataset=pairs)
    ),
    "padding free": Case({"padding_free": True, "max_length": None}),
    "padding free, multiple": Case({"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}),
    "multiple": Case({"pad_to_multiple_of": 16}),
    "cut at the end": Case({"max_length": 12, "completion_only_loss": False}, differs=True),
    "cut at the start": Case({"max_length": 12, "truncation_mode": "keep_end"}, differs=True),
    "shuffled": Case({"shuffle_dataset": True}, differs=True),
    "whole rows": Case({"completion_only_loss": False}, differs=True),
    "a column of its own": Case({"dataset_text_field": "words"}, given(train_dataset=lambda: texts("words"))),
    "prepared": Case({"dataset_kwargs": {"skip_prepare_dataset": True}}, given(train_dataset=tokens)),
    "a stream": Case(given=lambda: {"train_dataset": pairs().to_iterable_dataset()}),
    "formatting": Case(given=lambda: {"formatting_func": lambda r: r["words"] + "!", "train_dataset": texts("words")}),
    "chats": Case(given=given(train_dataset=chats)),
    "answers of chats": Case(
        {"assistant_only_loss": True},
        lambda: {"train_dataset": chats(), "processing_class": tokenizer(chat_template=MARKED)},
    ),
    "a template's file": Case({"chat_template_path": "{folder}/t.jinja"}, given(train_dataset=chats)),
    "another end": Case({"eos_token": "<|im_end|>"}, differs=True),
    "another padding": Case({"pad_token": "<|im_end|>"}),
    "chunked": Case({"loss_type": "chunked_nll"}),
    "extra columns": Case({"remove_unused_columns": False}, lambda: {"train_dataset": pairs(weight=2.0)}),
    "NEFTune": Case(NEFTUNE, differs=True),
    "NEFTune, Trainer": Case(NEFTUNE, kind=Trainer),
    "NEFTune, flat": Case({**NEFTUNE, "padding_free": True, "max_length": None}, differs=True),
    "NEFTune, packing": Case({**NEFTUNE, "packing": True, "max_length": 64}),
    "NEFTune, wrapped": Case({**NEFTUNE, "packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "NEFTune, multiple": Case({**NEFTUNE, "pad_to_multiple_of": 16}),
    "NEFTune, left": Case(NEFTUNE, collated(lambda b: None, padding_side="left"), kind=Trainer),
    "NEFTune, windows": Case(NEFTUNE, model=sliding),
    "NEFTune, bf16": Case({**SGD, **NEFTUNE, "bf16": True}, near=3e-3),
    "NEFTune, reentrant": Case({**NEFTUNE, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "windows": Case(model=sliding),
    "windows, flat": Case({"padding_free": True, "max_length": None}, model=sliding),
    "experts": Case({"router_aux_loss_coef": 0.0}, model=experts),
    "first tokens counted": Case({**SGD, "completion_only_loss": False}, model=gpt2),
    "first tokens counted, Trainer": Case(SGD, given(train_dataset=lambda: tokens(True)), gpt2, Trainer),
    "mean of means": Case({**SGD, "completion_only_loss": False}, model=uncounted),
    "mean of means, Trainer": Case(SGD, model=uncounted, kind=Trainer),
    "left": Case(given=collated(lambda b: None, padding_side="left"), kind=Trainer),
    "types of 0": Case(given=collated(lambda b: b.update(token_type_ids=0 * b["input_ids"])), kind=Trainer),
    "flattened": Case(given=lambda: {"data_collator": DataCollatorWithFlattening()}, kind=Trainer),
    "compiled": Case({"torch_compile": True, "torch_compile_backend": "eager"}),
    "NEFTune, compiled": Case({**NEFTUNE, "torch_compile": True, "torch_compile_backend": "eager"}),
}
LONG = (
    "compiled", "NEFTune, compiled", "keeps everything", "reentrant", "selective", "every second layer",
    "empties the cache", "counts tokens", "counts all tokens", "by length, told", "callbacks", "sgd", "epochs",
)  # fmt: skip


def built(case: Case, plan: Sequence[Method] | None, folder: Any) -> Any:
    """The case's trainer, with a plan unless it is None."""
    options: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": 4, "per_device_train_batch_size": 3, "use_cpu": True,
        "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 2, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    options |= copy.deepcopy(dict(case.options))  # transformers changes dicts in place
    options = {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in options.items()}
    more = {"processing_class": tokenizer(), **case.given()}
    more.setdefault("model", case.model())
    more.setdefault("train_dataset", tokens() if case.kind is Trainer else pairs())
    if case.kind is Trainer:
        more.setdefault("data_collator", DataCollatorForSeq2Seq(tokenizer()))
    config = more.pop("args", {Trainer: TrainingArguments, SFTTrainer: SFTConfig}[case.kind])(**options)
    if plan is None:
        return case.kind(args=config, **more)
    return with_plan(case.kind)(args=config, plan=Plan(plan), **more)


def trained(case: Case, plan: Sequence[Method] | None, folder: Any) -> Any:
    trainer = built(case, plan, folder)
    trainer.train()
    return trainer


def numbers(trainer: Any) -> list[dict[str, float]]:
    """What both kinds of run log, without times, and without what the plan alone adds."""
    plans = ("loss/", "entropy", "mean_token_accuracy")
    times = ("runtime", "per_second")
    kept = lambda k: not k.startswith(plans) and not k.endswith(times) and k != "total_flos"  # noqa: E731
    return [{k: v for k, v in row.items() if kept(k)} for row in trainer.state.log_history]


@pytest.fixture(scope="module")
def plain_default(tmp_path_factory) -> Any:
    return weights_of(trained(Case(), None, tmp_path_factory.mktemp("plain")).model)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in EQUAL])
def test_equal_to_the_trainer_without_a_plan(name, tmp_path, plain_default):
    case = EQUAL[name]
    (tmp_path / "t.jinja").write_text(TEMPLATE.replace("assistant", "helper"))
    own = trained(case, None, tmp_path)
    planned = trained(case, [], tmp_path)
    weights = weights_of(own.model)
    assert distance(weights_of(planned.model), weights) < case.near
    assert distance(weights, weights_of(case.model())) > 10 * case.near
    assert not case.differs or distance(weights, plain_default) > 10 * case.near
    logged = list(zip(numbers(planned), numbers(own), strict=True))
    for mine, theirs in logged:
        assert mine == pytest.approx(theirs, rel=0.02 if "bf16" in name else 2e-3), (mine, theirs)
    assert planned.state.num_input_tokens_seen == own.state.num_input_tokens_seen


# ---- refused


@dataclass(frozen=True)
class Refused(Case):
    plan: Sequence[Method] = ()
    words: tuple[str, ...] = ()
    late: bool = False  # only a batch shows it


PROMOT = [hf.ProMoT(num_virtual_tokens=4)]
MIX = [hf.InContextMix(pool=8)]
LATE: dict[str, Refused] = {
    "a column": Refused(
        {"remove_unused_columns": False},
        lambda: {"train_dataset": tokens(weight=lambda ids: 2.0)},
        kind=Trainer,
        words=("weight",),
    ),
    "labels of padding": Refused(
        given=collated(lambda b: b.update(labels=b["input_ids"].clone())), kind=Trainer, words=("padding",)
    ),
    "holes": Refused(
        given=collated(lambda b: b["attention_mask"][:, 2].zero_()), kind=Trainer, words=("attention_mask",)
    ),
    "positions": Refused(
        given=collated(lambda b: b.update(position_ids=counted(b) * 2)),
        kind=Trainer,
        words=("position_ids", "0, 2, 4"),
    ),
    "positions that start again": Refused(
        given=collated(lambda b: b.update(position_ids=counted(b) % 5)),
        kind=Trainer,
        words=("position_ids", "attention_mask"),
    ),
    "types": Refused(
        given=collated(lambda b: b.update(token_type_ids=b["attention_mask"])), kind=Trainer, words=("token_type_ids",)
    ),
    "types of 0 that count": Refused(
        given=collated(lambda b: b.update(token_type_ids=0 * b["input_ids"])),
        model=gpt2,
        kind=Trainer,
        words=("Trainer", "token_type_ids"),
    ),
    "positions of padding": Refused(
        given=collated(lambda b: None, padding_side="left"), model=gpt2, kind=Trainer, words=("right-padded",)
    ),
    "first tokens behind padding": Refused(
        given=lambda: {"train_dataset": tokens(whole=True), **collated(lambda b: None, padding_side="left")()},
        kind=Trainer,
        words=("behind padding", "padding_side"),
    ),
    "documents that see each other": Refused(
        given=lambda: {
            "data_collator": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
        },
        kind=Trainer,
        words=("Trainer", "cu_seq_lens"),
    ),
    "states that see other documents": Refused(
        {"padding_free": True, "max_length": None, "gradient_checkpointing": False},
        model=mamba,
        words=("SFTTrainer", "position_ids"),
    ),
    "states that see other documents, bf16": Refused(
        {"padding_free": True, "max_length": None, "gradient_checkpointing": False, "bf16": True},
        model=mamba,
        words=("SFTTrainer", "position_ids"),
    ),
}  # fmt: skip
REFUSED: dict[str, Refused] = {
    "an attention that looks ahead": Refused(model=without_mask, words=("LlamaForCausalLM", "not causal")),
    "an attention that looks ahead, Trainer": Refused(model=without_mask, kind=Trainer, words=("not causal",)),
    "smoothing": Refused({"label_smoothing_factor": 0.1}, words=("label_smoothing_factor",)),
    "loss function": Refused(given=lambda: {"compute_loss_func": len}, words=("compute_loss_func",)),
    "dft": Refused({"loss_type": "dft"}, words=("loss_type", "DFT()")),
    "batch size": Refused({"auto_find_batch_size": True}, words=("auto_find_batch_size",)),
    "experts": Refused(model=experts, words=("router_aux_loss_coef",)),
    "experts, told": Refused({"router_aux_loss_coef": 0.1}, model=experts, words=("router_aux_loss_coef",)),
    "adapter": Refused(given=lambda: {"peft_config": LoraConfig()}, words=("LoRA",)),
    "model_init": Refused(
        given=lambda: {"model": None, "model_init": build_model}, kind=Trainer, words=("model_init",)
    ),
    "another tokenizer": Refused({"chat_template_path": "{folder}"}, words=("chat_template_path", "jinja")),
    "fp16": Refused({"fp16": True}, plan=[FirstLayerOnly()], words=("FirstLayerOnly", "fp16")),
    "fp16 where steps are left out": Refused({"fp16": True}, plan=[hf.LocFT()], words=("LocFT drops", "fp16")),
    "fp16 where gradients are looked at": Refused({"fp16": True}, plan=[hf.SpIEL()], words=("SpIEL looks at", "fp16")),
    "frozen embeddings": Refused(
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        plan=[hf.Freeze(embeddings=True)],
        words=("use_reentrant",),
    ),
    "layerwise": Refused(
        {"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"},
        plan=[hf.OrthogonalSubspace()],
        words=("OrthogonalSubspace", "galore_adamw_layerwise"),
    ),
    "lomo": Refused({"optim": "lomo"}, plan=[FirstLayerOnly()], words=("FirstLayerOnly", "lomo")),
    "schedule-free": Refused(
        {"optim": "schedule_free_adamw"}, plan=[hf.WiSEFT()], words=("WiSEFT", "schedule_free_adamw")
    ),
    "by length": Refused({"train_sampling_strategy": "group_by_length"}, plan=MIX, words=("InContextMix",)),
    "in order": Refused({"train_sampling_strategy": "sequential"}, plan=MIX, words=("InContextMix", "sequential")),
    "stream": Refused(given=lambda: {"train_dataset": pairs().to_iterable_dataset()}, plan=MIX, words=("stream",)),
    "packing": Refused({"packing": True}, plan=PROMOT, words=("ProMoT", "packing=False")),
    "padding free": Refused({"padding_free": True}, plan=PROMOT, words=("ProMoT", "padding_free=False")),
    "noise before a soft prompt": Refused(NEFTUNE, plan=PROMOT, words=("ProMoT", "NEFTune")),
    "checkpointing behind a prefix": Refused(
        {"gradient_checkpointing": True},
        plan=[hf.PrefixTuning()],
        words=("PrefixTuning", "gradient_checkpointing=False"),
    ),
    "noise on other rows": Refused(NEFTUNE, plan=[LongestHalf()], words=("LongestHalf", "NEFTune")),
    "metrics": Refused(given=lambda: {"compute_metrics": len}, plan=PROMOT, words=("ProMoT", "compute_metrics")),
    "metrics' logits": Refused(
        given=lambda: {"preprocess_logits_for_metrics": len}, plan=PROMOT, words=("ProMoT", "compute_metrics")
    ),
    "best": Refused(
        {**EVALS, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2},
        given(eval_dataset=pairs),
        plan=PROMOT,
        words=("ProMoT", "load_best_model_at_end"),
    ),
    "best of an average": Refused(
        {**EVALS, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2},
        given(eval_dataset=pairs),
        plan=[hf.MovingAverage()],
        words=("MovingAverage", "load_best_model_at_end"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_built(name, tmp_path):
    case = REFUSED[name]
    with pytest.raises((PlanError, ModelError)) as caught:  # the model itself is refused where it is not causal
        built(case, case.plan, tmp_path)
    assert all(word in str(caught.value) for word in case.words), caught.value


def test_parallelism_is_refused(tmp_path):
    config = SFTConfig(str(tmp_path), use_cpu=True)
    config.parallelism_config = SimpleNamespace()
    with pytest.raises(PlanError, match="parallelism"):
        with_plan(SFTTrainer)(build_model(), config, train_dataset=pairs(), processing_class=tokenizer(), plan=Plan())


@pytest.mark.parametrize("name", LATE)
def test_refused_at_the_first_batch(name, tmp_path):
    case = LATE[name]
    trainer = built(case, [], tmp_path)
    before = weights_of(trainer.model)
    with pytest.raises(HoldfastError) as caught:
        trainer.train()
    assert all(word in str(caught.value) for word in case.words), caught.value
    assert distance(before, weights_of(trainer.model)) == 0


class HiddenSteps:
    """Stands for an optimizer that is none of torch's."""

    param_groups = ()


def test_optimizers_that_hide_their_steps_are_refused(tmp_path):
    class LayerWiseSGD(torch.optim.SGD): ...

    class TwoWeightsSGD(torch.optim.SGD):
        def eval(self) -> None: ...

    factory = lambda: lambda model, **_: HiddenSteps()  # noqa: E731
    for kind, plan, words in (
        (LayerWiseSGD, [FirstLayerOnly()], "inside of the backward"),
        (TwoWeightsSGD, [hf.WiSEFT()], "others for training"),
        (factory, [FirstLayerOnly()], "HiddenSteps"),
    ):
        case = Case(given=lambda kind=kind: {"optimizer_cls_and_kwargs": (kind, {"lr": 0.1})})
        trainer = built(case, plan, tmp_path)
        with pytest.raises(PlanError, match=words):
            trainer.train()


def test_a_soft_prompt_cannot_predict(tmp_path):
    trainer = trained(Case(), PROMOT, tmp_path)
    with pytest.raises(PlanError, match="soft prompt"):
        trainer.predict(trainer.train_dataset)


# ---- the tables


def missing(table: Mapping[str, str], known: set[str]) -> set[str]:
    return known ^ set(table)


def test_every_option_is_in_the_table():
    assert missing(TABLE, {f.name for f in dataclasses.fields(SFTConfig)}) == set()
    assert {f.name for f in dataclasses.fields(TrainingArguments)} <= set(TABLE)


def test_every_argument_is_in_the_table():
    known = {n for kind in (Trainer, SFTTrainer) for n in inspect.signature(kind.__init__).parameters} - {"self"}
    assert missing(ARGUMENTS, known) == set()


def bare(table: Mapping[str, str], word: str) -> set[str]:
    """Names that the table says are `word`, without a reason why there is no run."""
    return {n for n, said in table.items() if ":" not in said and word in said.split(", ")}


def used(cases: Sequence[Case]) -> Iterator[str]:
    for case in cases:
        yield from case.options
        yield from case.given()


def test_what_the_table_says_is_run_or_refused_here():
    standard = {"model", "train_dataset", "processing_class", "max_steps", "per_device_train_batch_size"}
    everything = bare(TABLE, "equal") | bare(ARGUMENTS, "equal")
    assert everything <= {*used(list(EQUAL.values())), *standard}
    refused = bare(TABLE, "refused") | bare(ARGUMENTS, "refused")
    assert refused <= {*used([*REFUSED.values(), *LATE.values()]), "parallelism_config"}


def test_a_new_option_is_noticed():
    @dataclass
    class Newer(SFTConfig):
        loss_scale: float = 1.0

    assert missing(TABLE, {f.name for f in dataclasses.fields(Newer)}) == {"loss_scale"}


def test_methods_write_rows_with_the_tokenizer_that_trains(tmp_path):
    """SFTTrainer changes the tokenizer when it is built; the anchor's prompts are written before that."""
    (tmp_path / "t.jinja").write_text(TEMPLATE.replace("assistant", "helper"))
    anchor = hf.ICLAnchor(pool=8, every=1, formats=("chat",))
    options = {"chat_template_path": "{folder}/t.jinja", "eos_token": "<|im_end|>"}
    trainer = built(Case(options, given(train_dataset=chats)), [anchor], tmp_path)
    rows = [TOKENIZER.decode(r.ids) for r in trainer.session.asides["ICLAnchor"]]
    assert rows and all("<|im_start|>helper\n" in text for text in rows)
    fresh = tokenizer()
    settle_tokenizer({"args": SimpleNamespace(eos_token="<|im_end|>"), "processing_class": fresh})
    assert fresh.eos_token == "<|im_end|>" and fresh.chat_template == TEMPLATE


# ---- NEFTune: how large, where, and when


class Seen:
    """What NEFTune adds at every call of the embeddings: (training, ids, (rows, width, D) noise)."""

    def __init__(self, model: Any):
        self.calls: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
        self.before: Any = None
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(self.keep, prepend=True)
        model.model.layers[0].register_forward_pre_hook(self.see, with_kwargs=True)

    def keep(self, module: Any, inputs: Any, out: torch.Tensor) -> None:
        self.before = module.training, inputs[0], out.detach()

    def see(self, _module: Any, inputs: Any, _kwargs: Any) -> None:
        training, ids, clean = self.before
        self.calls.append((training, ids, inputs[0].detach() - clean))


def noises(plan: Sequence[Method], folder: Any, **options: Any) -> tuple[Any, list[Any]]:
    """A trainer after two steps without recomputing, and what its forwards saw; asides stand behind the rows."""
    torch.manual_seed(0)
    trainer = built(Case({**NEFTUNE, "gradient_checkpointing": False, "max_steps": 2, **options}), plan, folder)
    seen = Seen(trainer.session.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model)
    seen.calls.clear()
    trainer.train()
    return trainer, seen.calls


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}, {"pad_to_multiple_of": 64}])
def test_the_noise_is_as_large_as_on_the_collated_batch(options, tmp_path):
    trainer, calls = noises([], tmp_path, **options)
    lengths = [n.shape[1] for n in batch_shapes(trainer, options)]
    trainings = [noise for training, _, noise in calls if training]
    assert len(trainings) == 4
    for length, noise in zip(lengths, trainings, strict=True):
        most = 5.0 / (length * 32) ** 0.5
        assert noise.abs().max() == pytest.approx(most, rel=0.01)
        assert noise.std() == pytest.approx(most / 3**0.5, rel=0.05)


def batch_shapes(trainer: Any, options: Mapping[str, Any]) -> list[torch.Tensor]:
    """The four batches of the run again: the sampler is seeded as the trainer was."""
    torch.manual_seed(0)
    return [b["input_ids"] for b, _ in zip(trainer.get_train_dataloader(), range(4), strict=False)]


@pytest.mark.parametrize("adapter", [[], [hf.LoRA(r=4)]], ids=["dense", "LoRA"])
def test_noise_is_for_the_rows_of_the_batch_alone(adapter, tmp_path):
    methods = [*adapter, hf.ICLAnchor(pool=4, every=1), hf.KLToBase(weight=2.0)]
    trainer, calls = noises(methods, tmp_path, gradient_accumulation_steps=1)
    rows = trainer.session.asides["ICLAnchor"]
    trainings = [(ids, noise) for training, ids, noise in calls if training]
    assert len(trainings) == 2
    for _, noise in trainings:
        size = noise[0].abs().amax(-1)
        quiet = int((size == 0).sum())
        assert any(quiet == len(r.ids) for r in rows)  # one prompt of the anchor a step, whole and last
        assert (size[-quiet:] == 0).all() and (size[:-quiet] > 0).all()
    assert all(noise.abs().max() == 0 for training, _, noise in calls if not training)
    assert not adapter or any(not training for training, _, _ in calls)  # the base was asked about the task's rows


def test_evaluation_is_without_noise_and_the_hook_goes_away(tmp_path):
    quiet = trained(Case({**EVALS, "learning_rate": 0.0}, given(eval_dataset=pairs)), [], tmp_path)
    noisy = trained(Case({**EVALS, **NEFTUNE, "learning_rate": 0.0}, given(eval_dataset=pairs)), [], tmp_path)
    losses = [[r["eval_loss"] for r in t.state.log_history if "eval_loss" in r] for t in (quiet, noisy)]
    assert losses[0] == losses[1] and losses[0]
    assert noisy.neftune_noise_alpha == 5.0
    noisy.model.train()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(noisy.model(ids).logits, quiet.model.train()(ids).logits)


def test_the_hook_goes_away_when_training_fails(tmp_path):
    case = Case(NEFTUNE, collated(lambda b: b["attention_mask"][:, 2].zero_()), kind=Trainer)
    trainer = built(case, [], tmp_path)
    with pytest.raises(HoldfastError):
        trainer.train()
    assert not trainer.model.get_input_embeddings()._forward_hooks and trainer.neftune_noise_alpha == 5.0


def test_no_noise_unless_a_batch_is_announced():
    model = build_model().train()
    noise = Noise(model, 5.0)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, model(ids).logits)
    noise.remove()
    assert not model.get_input_embeddings()._forward_hooks


# ---- the comparison before the first step


def test_the_comparison_leaves_no_trace(tmp_path, plain_default):
    """Neither in the weights (test_equal...) nor in the random numbers, the mode, or what is logged."""
    trainer = built(Case({**EVALS}, given(eval_dataset=pairs)), [], tmp_path)
    trainer.train()
    evaluated = [r for r in trainer.state.log_history if "eval_entropy" in r]
    assert len(evaluated) == 2 and distance(weights_of(trainer.model), plain_default) < 2e-4
    assert trainer._compared


def test_the_two_rows_are_the_shortest_and_the_longest():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": mask, "labels": torch.full((3, 4), -100)}
    some = hf_agree.some_of([batch])
    assert some["input_ids"].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]] and set(some) == set(batch)
    other = {**batch, "input_ids": batch["input_ids"] + 100, "labels": batch["labels"].clone()}
    other["labels"][1, 2] = other["input_ids"][1, 2]
    assert hf_agree.some_of([batch, other])["input_ids"].min() > 99  # the first that has a target
    flat = {"input_ids": torch.arange(4)[None], "labels": torch.arange(4)[None], "max_length_q": 4}
    assert hf_agree.some_of([flat])["input_ids"].tolist() == [[0, 1, 2, 3]]


def test_a_loss_of_another_kind_is_refused(tmp_path):
    """A model whose own loss is not the mean over its labels' tokens."""
    model = build_model()
    forward = model.forward

    @functools.wraps(forward)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss * 2
        return out

    model.forward = doubled
    trainer = built(Case(given=lambda: {"model": model}, kind=Trainer), [], tmp_path)
    with pytest.raises(PlanError, match="a loss of"):
        trainer.train()


# ---- several processes

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_trainer_options import Case, NEFTUNE, SGD, distance, trained, weights_of
import json, torch

torch.set_num_threads(1)
folder = Path(sys.argv[1])
found = {}
for name, case in {
    "default": Case(SGD),
    "own means": Case({**SGD, "average_tokens_across_devices": False, "completion_only_loss": False}),
    "split": Case({**SGD, "per_device_train_batch_size": 4, "accelerator_config": {"split_batches": True}}),
    "dispatched": Case({**SGD, "accelerator_config": {"dispatch_batches": True}, "pad_to_multiple_of": 64}),
    "NEFTune": Case({**SGD, **NEFTUNE}),
}.items():
    ends = [weights_of(trained(case, plan, folder).model) for plan in (None, [])]
    found[name] = [distance(*ends), distance(ends[0], weights_of(case.model()))]
(folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
"""


@pytest.mark.long
def test_equal_in_two_processes(tmp_path):
    import json
    from pathlib import Path

    together(2, "-c", WORKER, str(tmp_path), str(Path(__file__).parent))
    for rank in (0, 1):
        for name, (apart, moved) in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert apart < 1e-5 < 1e-2 < moved, (name, apart, moved)
