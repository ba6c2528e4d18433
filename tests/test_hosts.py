"""Both hosts give the same weights, and what `with_plan` promises beside that."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from cases import run, stands
from holdfast import Plan, models, with_plan
from holdfast import methods as hf
from holdfast.data.mix import Mix
from holdfast.data.targets import weighed
from holdfast.data.tokens import tokenize
from holdfast.engine.pack import WEIGHT, TokenRow, token_row
from holdfast.errors import DataError, HoldfastError, PlanError
from holdfast.hosts import hf as host
from holdfast.hosts.hf_batches import placed_rows
from holdfast.hosts.hf_setup import mixes
from holdfast.hosts.plain import Training, train
from holdfast.method import Method, Stage, canonical
from holdfast.services import Context
from holdfast.session import Session
from test_law_rows import Averaged, Unlikely
from trainers import Watcher, dataset, more, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
Weights = dict[str, torch.Tensor]
SAME = {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
STEPS = 6  # of 4 rows: one epoch of the 24 tickets
TRAINERS = {"Trainer": Trainer, "SFTTrainer": SFTTrainer}


@dataclass(frozen=True, kw_only=True)
class FirstLayerOnly(Method):
    """A grad site: scales by name, so that it differs before and after clipping."""

    def grad(self, name: str, grad: torch.Tensor, state: Any) -> torch.Tensor:
        return grad * (1.0 if "layers.0" in name else 0.1)


@dataclass(frozen=True, kw_only=True)
class TwoRounds(Method):
    """Stages that say everything a stage can say: other weights, other rows, back to the base."""

    def data(self, mix: Mix, ctx: Any) -> Mix:
        return mix.add(more(mix))

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("first", 0.5, (r"layers\.0\.",), sources=("more",)),
            Stage("both", 0.25, ("mlp", "norm"), sources=("task", "more"), restart=True, learning_rate=2e-3),
            Stage("last", 0.25, ("attn",), sources=("task",)),
        )


@dataclass(frozen=True, kw_only=True)
class LongestHalf(Method):
    """A batch site: keeps the longer half of a step's rows."""

    def batch(self, rows: Sequence[TokenRow], step: int, look: Any) -> Sequence[TokenRow]:
        return sorted(rows, key=lambda r: -len(r.ids))[: len(rows) // 2]


@dataclass(frozen=True, kw_only=True)
class Idle(Method):
    """Does nothing, which must be noticed."""

    does: ClassVar = "nothing"


METHODS: dict[str, Sequence[Method]] = {
    "none": [],
    "LoRA": [hf.LoRA(r=4)],
    "Freeze": [hf.Freeze(layers=1)],
    "LocFT": [hf.LocFT()],
    "GreenTrainer": [hf.GreenTrainer(rho=0.6, epochs=1)],
    "AdaLoRA": [hf.AdaLoRA(r=4, target_r=2, tinit=0.25, tfinal=0.25)],
    "CoSO": [hf.CoSO(rank=4, every=2, sketch=6, samples=4, max_tokens=16, rows_per_gradient=2)],
    "OrthogonalLoRA": [hf.OrthogonalLoRA(r=4, principal=3)],
    "OrthogonalLoRA hard": [hf.OrthogonalLoRA(r=4, principal=3, hard=True)],
    "CorDA": [hf.CorDA(r=4, samples=8, max_tokens=32)],
    "HalfFineTune": [hf.HalfFineTune()],
    "KLToBase": [hf.KLToBase(weight=2.0)],
    "KLToBase LoRA": [hf.LoRA(r=4), hf.KLToBase(weight=2.0)],
    "ICLAnchor": [hf.ICLAnchor(pool=8, weight=5.0, every=3)],
    "ICLAnchor held": [hf.ICLAnchor(pool=8, weight=5.0, every=2, hold=1e-3, hold_over=1)],
    "DFT": [hf.DFT()],
    "L2ToInit": [hf.L2ToInit(alpha=10.0)],
    "OrthogonalSubspace": [hf.OrthogonalSubspace()],
    "InContextMix": [hf.InContextMix(pool=16, share=0.5)],
    "WiSEFT": [hf.WiSEFT()],
    "SpIEL": [hf.SpIEL(density=0.1, every=3, accumulate=2)],
    "CoBa": [hf.CoBa(share=0.3, cut=0.3, warmup=1)],
    "steps on feedback": [Watcher()],
    "stages": [TwoRounds()],
    "ControlLLM": [hf.ControlLLM(every=1, weight=5.0), hf.KLToBase(weight=2.0)],
    "HalfFineTune in rounds": [hf.HalfFineTune(rounds=3), hf.InContextMix(pool=16, share=0.5)],
    "PromptTuning": [hf.PromptTuning(num_virtual_tokens=3), hf.DFT()],
    "PrefixTuning": [hf.PrefixTuning(num_virtual_tokens=3)],
    "GSLoRA": [hf.GSLoRA(r=4, weight=50.0, proximal=True, forget=("holdfast:general/instructions.jsonl",))],
    "S2FT": [hf.S2FT(d_ratio=0.2, v_ratio=0.5)],
    "PEQA": [hf.PEQA(), hf.KLToBase(weight=2.0)],
    "LoRAMoE": [hf.LoRAMoE(r=2, experts=4, weight=5.0, lora_dropout=0.0), hf.InContextMix(pool=16, share=0.5)],
    "S3FT": [hf.S3FT(verifier="cases:half_right", max_new_tokens=2, temperature=5.0, ended=False)],
    "SDFT": [hf.SDFT(temperature=0.15, max_completion_length=6)],
    "SDFT LoRA": [hf.LoRA(r=4), hf.SDFT(temperature=0.15, max_completion_length=6, teacher_model_kind="ema")],
    "grad": [FirstLayerOnly()],
    "batch": [LongestHalf()],
    "Curriculum": [hf.Curriculum(start=0.3, epochs=0.5)],
    "MaskedThought": [hf.MaskedThought(max_rate=0.8, warmup=0.5)],
    "MaskedThought KLToBase": [hf.MaskedThought(max_rate=0.8, warmup=0.5), hf.KLToBase(weight=2.0)],
    "MFTCoder": [hf.InContextMix(pool=16, share=0.5), hf.MFTCoder(weights=(("InContextMix", 3.0),))],
    "TLTraining LoRA": [hf.LoRA(r=4), hf.TLTraining()],
    "FLOW LoRA": [hf.LoRA(r=4), hf.FLOW()],
    "EWC LoRA": [hf.LoRA(r=4), hf.EWC(alpha=100.0, rows=2, max_tokens=16)],
    "FeatureDistillation": [hf.FeatureDistillation(weight=100.0)],
    "SkillIt": [hf.SkillIt(every=2, share=0.3, cut=0.3, graph=(("SkillIt", "task", 0.5),))],
    "FAIT": [hf.FAIT(tries=2, max_new_tokens=3, temperature=5.0)],
    "PCP": [hf.PCP(share=0.4)],
    "AnchoredDecay": [hf.AnchoredDecay(alpha=100.0)],
    "AnchoredDecay LoRA": [hf.LoRA(r=4), hf.AnchoredDecay(alpha=100.0)],
    "OnPolicyKL LoRA": [hf.LoRA(r=4), hf.OnPolicyKL(weight=20.0, max_new_tokens=4)],
    "filter LoRA": [hf.LoRA(r=4), Unlikely()],
    "by row": [Averaged(per="row", grouped=True)],
    "by source": [Averaged(per="source")],
}


class InOrder:
    """A mix without chance: the rows one after the other, for ever."""

    def __init__(self, rows: Sequence[TokenRow]):
        self.rows = rows

    def only(self, *names: Any) -> InOrder:
        return self

    def draw(self, seed: int) -> Iterator[TokenRow]:
        while True:
            yield from self.rows

    def num_rows(self, epochs: float) -> int:
        return round(epochs * len(self.rows))


@pytest.fixture(scope="module")
def task(rows, tokenizer) -> list[TokenRow]:
    return [tokenize(r, tokenizer, 512) for r in rows]


@pytest.fixture(scope="module")
def data(task) -> Dataset:
    return dataset(task)


@pytest.fixture
def base(tiny_model) -> Any:
    return tiny_model(tied=False)


def weights_of(model: Any) -> Weights:
    return {canonical(n): p.detach().clone() for n, p in model.named_parameters()}


def distance(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.fixture(scope="module")
def plain(tiny_model, tokenizer, rows, task) -> Callable[..., Weights]:
    """Weights of the reference host, remembered by the plan's words; rows: others than the tickets'."""
    known: dict[str, Weights] = {}
    given, tickets = task, rows

    def run(methods: Sequence[Method], steps: int = STEPS, rows: Any = None, **settings: Any) -> Weights:
        key, task = f"{methods} {steps} {settings} {rows is None}", given if rows is None else rows
        if key not in known:
            model = tiny_model(tied=False)
            ctx = Context(model, tokenizer, 0, tickets, total_steps=steps, max_length=512)
            session = Session(Plan(methods), model, ctx)
            session.prepare()
            mix = session.mix(task)
            mix = mix if any(map(mixes, methods)) else InOrder(task)
            wanted = {"batch_size": 2, "warmup_steps": 2, "save_steps": 0, **SAME, **settings}
            train(session, mix, Training(steps, **wanted))
            session.merge()
            session.finish()
            known[key] = weights_of(session.model)
        return known[key]

    return run


@pytest.fixture
def make(base, data, tokenizer, tmp_path) -> Callable[..., Any]:
    """A trainer with a plan on the tickets, in their order; keywords go to its arguments."""

    def build(kind: type, methods: Sequence[Method], steps: int = STEPS, given: Any = None, **options: Any) -> Any:
        options = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "warmup_steps": 2,
            "seed": 0,
            "train_sampling_strategy": "random" if any(map(mixes, methods)) else "sequential",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "logging_steps": 2,
            "disable_tqdm": True,
            **SAME,
            **options,
        }
        config = {Trainer: TrainingArguments, SFTTrainer: SFTConfig}[kind](**options)
        given = {"model": base, "train_dataset": data, "processing_class": tokenizer, **(given or {})}
        if kind is Trainer and "data_collator" not in given:
            given["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
        return with_plan(kind)(args=config, plan=Plan(methods), **given)

    return build


# ---- equal weights


# TRL's trainer differs in what collates and divides: these are quick with both
WITH_BOTH = ("none", "LoRA", "KLToBase LoRA", "InContextMix", "batch", "stages", "OnPolicyKL LoRA")


def both() -> list[Any]:
    """Every plan with every trainer, and what of that is long."""
    late = {(p.values[0], k): p.marks for p in stands(METHODS) for k in TRAINERS}
    once = {(n, "SFTTrainer"): (pytest.mark.long,) for n in METHODS if n not in WITH_BOTH}
    return [pytest.param(n, k, marks=late[n, k] or once.get((n, k), ())) for n, k in late]


@pytest.mark.parametrize("name, kind", both())
def test_hosts_give_equal_weights(name, kind, make, plain, base):
    start, expected = weights_of(base), plain(METHODS[name])
    drops = {"gradient_checkpointing": False} if any(m.prefix for m in METHODS[name]) else {}  # TRL asks for it
    trainer = make(TRAINERS[kind], METHODS[name], **drops)
    trainer.train()
    assert distance(weights_of(trainer.model), expected) < 1e-6
    if start.keys() == expected.keys():
        assert distance(start, expected) > 1e-3
        assert name == "none" or distance(plain([]), expected) > 1e-4, name


@pytest.mark.parametrize("methods", [[], [hf.Freeze(layers=1, layer_decay=0.5)]], ids=["none", "rates of its own"])
def test_moments_of_eight_bits_equal_plain(methods, make, plain, base):
    pytest.importorskip("bitsandbytes")
    start, expected = weights_of(base), plain(methods, optim="adamw_bnb_8bit")
    trainer = make(Trainer, methods, optim="adamw_bnb_8bit")
    trainer.train()
    assert distance(weights_of(trainer.model), expected) < 1e-5 < distance(start, expected)
    refused = pytest.raises(PlanError, match="LIFT drops the moments of entries that leave, but Trainer")
    with refused:
        make(Trainer, [hf.LIFT()], optim="adamw_bnb_8bit")


def test_other_models_are_merged_alike(make, plain, base, tiny_model, tokenizer, tmp_path):
    other = tiny_model(tied=False)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    models.save_model(other, tokenizer, tmp_path / "other", card=None)
    methods = [hf.TIES(models=(str(tmp_path / "other"),), density=0.5), hf.LiNeS(alpha=0.5)]
    trainer = make(Trainer, methods)
    trainer.train()
    merged = weights_of(trainer.model)
    far = {n: (merged[n] - w).abs() > 1e-6 for n, w in plain(methods).items()}
    assert sum(int(f.sum()) for f in far.values()) <= 3  # numbers at the threshold, where rounding decides
    assert distance(merged, plain([hf.TIES(density=0.5), hf.LiNeS(alpha=0.5)])) > 1e-3


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_second_stage_from_the_base_equals_plain(kind, make, plain):
    trainer = make(TRAINERS[kind], [hf.LTSFT()], steps=2 * STEPS)
    trainer.train()
    assert distance(weights_of(trainer.model), plain([hf.LTSFT()], steps=2 * STEPS)) < 1e-6


@pytest.mark.parametrize("kind", TRAINERS)
def test_stages_equal_plain(kind, make, plain):
    methods = [hf.ProMoT(num_virtual_tokens=4)]
    trainer = make(TRAINERS[kind], methods, steps=2 * STEPS)  # the second stage starts with the first row again
    out = trainer.train()
    expected = plain(methods, steps=2 * STEPS)
    assert distance(weights_of(trainer.model), expected) < 1e-5  # the prompt learns at 0.05
    assert "holdfast_prompt" in expected and out.global_step == STEPS and trainer.args.max_steps == 2 * STEPS


def test_gradients_change_once_without_clipping(make, plain):
    trainer = make(Trainer, [FirstLayerOnly()], max_grad_norm=0.0)
    trainer.train()
    assert distance(weights_of(trainer.model), plain([FirstLayerOnly()], max_grad_norm=0.0)) < 1e-6


def test_an_epoch_with_a_short_last_step(make, plain, data):
    trainer = make(SFTTrainer, [], max_steps=-1, num_train_epochs=2, steps=0, gradient_accumulation_steps=5)
    trainer.train()
    assert trainer.state.global_step == 6  # 12 batches an epoch: 5 + 5 + 2
    assert trainer.session.realised["task/examples"] == 2 * len(data)


@pytest.mark.parametrize("more", [[], METHODS["InContextMix"]], ids=["task", "mix"])
def test_an_epoch_ends_as_in_plain(more, make, tiny_model, tokenizer, rows):
    """24 tickets in steps of four, or 48 rows with as many of another source: the mean loss of the first pass ends."""
    methods, ends = [*more, hf.LocFT(threshold=1e9)], 12 if more else 6
    trainer = make(SFTTrainer, methods, steps=20)
    trainer.train()
    assert trainer.state.global_step == ends and "LocFT" in trainer.session.steering.ended
    got = run(methods, tiny_model(), tokenizer, rows, 20)
    assert len(got.log.loss) == ends and "LocFT" in got.log.ended


def test_several_epochs_of_a_mix_go_on_in_it(make, plain):
    """24 tickets and 24 shots an epoch: 12 steps of 4 rows; the second epoch draws new rows and another order."""
    mixed = METHODS["InContextMix"]
    trainer = make(SFTTrainer, mixed, steps=24)
    trainer.train()
    assert trainer.state.epoch == 2
    assert distance(weights_of(trainer.model), plain(mixed, steps=24)) < 2e-6
    shots = trainer.session.realised["InContextMix/examples"]
    assert shots == trainer.session.realised["task/examples"] == 48


# ---- packing


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packed_documents_stay_apart(options, make, plain, data):
    """One step is the whole set, so that only the boundaries can make a difference."""
    whole = {"gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    settings = {"max_length": 128, "per_device_train_batch_size": len(data), **whole, **options}
    trainer = make(SFTTrainer, [hf.KLToBase()], steps=3, **settings)
    if "packing" in options:
        assert len(trainer.train_dataset) < len(data) / 2
    trainer.train()
    expected = plain([hf.KLToBase()], steps=3, batch_size=len(data), **whole)
    assert distance(weights_of(trainer.model), expected) < 1e-6


def test_a_mix_is_packed_again(make):
    methods = [hf.InContextMix(pool=16, share=0.5)]
    trainer = make(SFTTrainer, methods, steps=3, packing=True, max_length=512, learning_rate=1e-3)
    trainer.train()
    seen = trainer.session.realised
    assert seen["InContextMix/examples"] and seen["task/examples"]
    assert sum(len(n) for n in trainer.train_dataset["seq_lengths"]) > len(trainer.train_dataset)


def test_rows_of_a_padded_batch():
    batch = {
        "input_ids": torch.tensor([[9, 5, 6, 7], [3, 4, 9, 9]]),
        "labels": torch.tensor([[-100, -100, -100, 7], [3, 4, -100, -100]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]),
    }
    a, b = host.rows_of(batch)
    assert a.ids.tolist() == [5, 6, 7] and a.scored.tolist() == [False, False, True]
    assert b.ids.tolist() == [3, 4] and b.scored.tolist() == [False, True]  # nothing before the first


@pytest.mark.parametrize(
    "marks",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5, 6], dtype=torch.int32)},
    ],
)
def test_rows_of_a_packed_batch(marks):
    ids = torch.tensor([[1, 2, 3, 4, 5, 0]])
    labels = ids.clone()
    labels[0, [0, 3, 5]] = -100  # first tokens, and the last token is padding
    rows = host.rows_of(
        {"input_ids": ids, "labels": labels, **marks}, {token_row([4, 5], 1).key: token_row([4, 5], 1, source="shots")}
    )
    assert [r.key for r in rows] == [token_row([1, 2, 3], 1).key, token_row([4, 5], 1).key]
    assert [r.source for r in rows] == ["task", "shots"]


def test_rows_of_shifted_labels_and_of_nothing():
    ids = torch.tensor([[1, 2, 3]])
    shifted = {"input_ids": ids, "shift_labels": torch.tensor([[2, -100, -100]])}
    assert host.rows_of(shifted)[0].scored.tolist() == [False, True, False]
    (empty,) = host.rows_of({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert not empty.num_scored and len(empty.ids) == 3


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, "without labels"),
        ({"labels": torch.tensor([[2, 3, 4]])}, "not the tokens themselves"),
        ({"labels": torch.tensor([[1, 2, 3]]), "pixel_values": torch.zeros(1)}, "pixel_values"),
        ({"labels": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 1, 3, 3)}, "shape"),
        (
            {"labels": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])},
            "padding would be learnt",
        ),
        ({"labels": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[0, 1, 1]])}, "behind padding"),
        ({"labels": torch.tensor([[1, -100, 3]]), "attention_mask": torch.tensor([[1, 0, 1]])}, "between ones"),
        ({"labels": torch.tensor([[1, 2, 3]]), "token_type_ids": torch.tensor([[0, 0, 1]])}, "token_type_ids"),
        ({"labels": torch.tensor([[1, 2, 3]]), "position_ids": torch.tensor([[0, 2, 4]])}, "0, 2, 4"),
        ({"labels": torch.tensor([[1, 2, 3]]), "position_ids": torch.tensor([[4, 5, 6]])}, "4, 5, 6"),
        ({"labels": torch.tensor([[1, 2, 3]]), "position_ids": torch.tensor([[0, 1, 0]])}, "another document"),
        ({"labels": torch.tensor([[1, 2, 3]]), "cu_seq_lens_q": torch.tensor([0, 1, 3])}, "another document"),
        (
            {
                "labels": torch.tensor([[1, 2, -100]]),
                "position_ids": torch.tensor([[0, 1, 0]]),
                "attention_mask": torch.ones(1, 3),
            },
            "see earlier ones",
        ),
    ],
)
def test_rows_of_refuses(extra, words):
    with pytest.raises(DataError, match=words):
        host.rows_of({"input_ids": torch.tensor([[1, 2, 3]]), **extra})


def test_rows_know_where_they_stood():
    ids = torch.tensor([[9, 5, 6, 7], [3, 4, 9, 9]])
    labels = torch.tensor([[-100, -100, -100, 7], [3, 4, -100, -100]])
    padded = {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])}
    flat = {"input_ids": ids[:1], "labels": ids[:1] * 0 - 100, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    flat["labels"][0, 3] = 7
    assert [at.tolist() for _, at in placed_rows(padded)] == [[1, 2, 3], [4, 5]]
    assert [at.tolist() for _, at in placed_rows(flat)] == [[2, 3]]  # the first document has no target


def test_a_batch_without_targets_changes_nothing_but_runs(make, base, task):
    """Weight decay aside, a step whose rows have no target leaves the weights alone."""
    blank = dataset([TokenRow(r.ids, np.zeros_like(r.scored)) for r in task])
    before = weights_of(base)
    trainer = make(Trainer, [], steps=2, given={"train_dataset": blank}, weight_decay=0.0)
    trainer.train()
    assert distance(before, weights_of(trainer.model)) == 0


# ---- the user's own settings


def test_what_the_user_froze_stays_frozen(make, base):
    base.lm_head.requires_grad_(False)
    before = weights_of(base)
    trainer = make(Trainer, [])
    trainer.train()
    after = weights_of(trainer.model)
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_update_site_in_a_ready_optimizer(make, base):
    methods = [hf.OrthogonalSubspace()]
    own = torch.optim.AdamW(base.parameters(), lr=1e-3, weight_decay=0.1)
    name = "model.layers.0.mlp.up_proj.weight"
    before = weights_of(base)[name]
    trainer = make(Trainer, methods, given={"optimizers": (own, None)})
    trainer.train()
    state, step = trainer.session.state["OrthogonalSubspace"], weights_of(trainer.model)[name] - before
    inside = state[f"U/{name}"].T @ step @ state[f"V/{name}"].T
    assert step.abs().max() > 1e-3 and inside.abs().max() < 1e-6


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_is_the_trainers_own(kind, make, data, task):
    trainer = make(TRAINERS[kind], [hf.ICLAnchor(pool=4, weight=50.0)], given={"eval_dataset": data})
    trainer.train()
    seen = trainer.evaluate()["eval_loss"]
    assert trainer.state.log_history[-1]["eval_loss"] == seen
    trainer.model.eval()
    with torch.no_grad():
        logp = [trainer.model(torch.as_tensor(r.ids)[None]).logits[0].log_softmax(-1) for r in task]
    losses = [
        -lp[:-1][torch.arange(len(r.ids) - 1), r.ids[1:]][r.scored[1:]] for lp, r in zip(logp, task, strict=True)
    ]
    batches = [torch.cat(losses[n : n + 8]).mean() for n in range(0, len(losses), 8)]  # as the trainer averages
    assert seen == pytest.approx(torch.stack(batches).mean().item(), rel=1e-4)


def test_evaluation_reads_the_soft_prompt(make, data):
    trainer = make(SFTTrainer, [hf.ProMoT(num_virtual_tokens=4)], steps=8, given={"eval_dataset": data})
    trainer.train()
    with_prompt = trainer.evaluate()["eval_loss"]
    torch.nn.init.zeros_(trainer.model.holdfast_prompt)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(with_prompt, rel=1e-5)


def test_logs_hold_the_parts_of_the_loss(make):
    trainer = make(SFTTrainer, [hf.KLToBase(weight=2.0), hf.L2ToInit(alpha=1.0)])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    for entry in logs:
        parts = [entry[f"loss/{n}"] for n in ("task", "KLToBase", "L2ToInit")]
        assert entry["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert logs[-1]["loss/KLToBase"] > 0 and logs[-1]["loss/L2ToInit"] > 0


def test_gradient_checkpointing_gives_the_same(make, plain):
    trainer = make(Trainer, METHODS["KLToBase"], gradient_checkpointing=True)
    trainer.train()
    assert distance(weights_of(trainer.model), plain(METHODS["KLToBase"])) < 1e-6


def test_bf16_autocast_learns(make, plain):
    trainer = make(SFTTrainer, [hf.LoRA(r=4), hf.KLToBase()], bf16=True)
    trainer.train()
    near = distance(weights_of(trainer.model), plain([hf.LoRA(r=4), hf.KLToBase()]))
    assert 0 < near < 0.02


# ---- resuming

SAVED: dict[str, Sequence[Method]] = {
    "dense": [hf.OrthogonalSubspace(), hf.ICLAnchor(pool=8, weight=5.0), hf.L2ToInit(), hf.WiSEFT()],
    "adapter": [hf.LoRA(r=4), hf.Freeze(layers=1), hf.InContextMix(pool=16), hf.KLToBase(weight=2.0)],
    "stages": [hf.ProMoT(num_virtual_tokens=4), hf.LoRA(r=4)],
    "rows": [
        hf.LoRA(r=4),
        Unlikely(),
        hf.Curriculum(),
        hf.Replay(share=0.5),
        hf.MFTCoder(),
        hf.MaskedThought(),
        hf.TLTraining(),
    ],
    "other stages": [TwoRounds()],
    "sparse stages": [hf.LTSFT(full_share=0.25), hf.SpIEL(density=0.0)],
    "feedback": [Watcher()],
    "sparse": [hf.SpIEL(density=0.1, every=3, accumulate=2)],
    "replaced": [hf.ControlLLM(every=2, mixture="dlerp"), hf.Freeze(patterns=("norm",)), hf.KLToBase(weight=2.0)],
    "rollouts": [hf.LoRA(r=4), hf.SDFT(temperature=0.15, max_completion_length=6, teacher_model_kind="ema")],
}
FROM = {
    "stages": "checkpoint-2",
    "other stages": "stage-both/checkpoint-1",
    "sparse stages": "stage-full/checkpoint-2",
}
SAVING = {"save_strategy": "steps", "save_steps": 2}
EVERY = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("name", SAVED)
def test_resume_equals_uninterrupted(name, make, tiny_model, tmp_path):
    whole = make(SFTTrainer, SAVED[name], steps=8, **EVERY)
    whole.train()
    saved = tmp_path / "out" / FROM.get(name, "checkpoint-4")
    again = make(SFTTrainer, SAVED[name], steps=8, given={"model": tiny_model(tied=False)}, **EVERY)
    again.train(resume_from_checkpoint=str(saved))
    assert distance(weights_of(whole.model), weights_of(again.model)) < 1e-7
    assert whole.session.effects.keys() == again.session.effects.keys()
    assert whole.session.realised == again.session.realised


def test_resume_inside_the_first_stage(make, tiny_model, tmp_path):
    whole = make(Trainer, [hf.ProMoT(num_virtual_tokens=4)], steps=8, **SAVING)
    whole.train()
    again = make(
        Trainer, [hf.ProMoT(num_virtual_tokens=4)], steps=8, given={"model": tiny_model(tied=False)}, **SAVING
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "stage-prompt" / "checkpoint-2"))
    assert distance(weights_of(whole.model), weights_of(again.model)) < 1e-7


@pytest.fixture
def stopped(make, tmp_path) -> Any:
    """The folder of a run's last checkpoint, its first half done."""
    trainer = make(Trainer, SAVED["dense"], steps=2, **SAVING)
    trainer.train()
    return tmp_path / "out" / "checkpoint-2"


def test_plan_state_comes_from_the_checkpoint(stopped, make, tiny_model):
    path = stopped / "holdfast" / "state.safetensors"
    state = load_file(path)
    name = next(k for k in state if "/U/" in k)
    save_file({**state, name: torch.full_like(state[name], 7.0)}, path)
    again = make(Trainer, SAVED["dense"], steps=2, given={"model": tiny_model(tied=False)}, **SAVING)
    again.train(resume_from_checkpoint=True)
    kept = again.session.state["OrthogonalSubspace"][name.split("/", 2)[2]]
    assert (kept == 7.0).all()
    before = json.loads((stopped / "holdfast" / "plan.json").read_text())["effects"]
    assert again.session.effects["OrthogonalSubspace"] == before["OrthogonalSubspace"] > 0  # not one step more


@pytest.mark.parametrize(
    ("methods", "tied", "spoil", "words"),
    [
        ([hf.L2ToInit()], False, False, "another plan"),
        (SAVED["dense"], None, False, "another base model"),
        (SAVED["dense"], False, True, "holds no plan"),
    ],
)
def test_a_foreign_checkpoint_is_refused(methods, tied, spoil, words, stopped, make, tiny_model):
    model = tiny_model(tied=False)
    if tied is None:
        torch.nn.init.normal_(model.lm_head.weight)
    if spoil:
        (stopped / "holdfast" / "plan.json").unlink()
    again = make(Trainer, methods, steps=2, given={"model": model})
    with pytest.raises(HoldfastError, match=words):
        again.train(resume_from_checkpoint=str(stopped))


def test_nothing_to_resume(make):
    with pytest.raises(HoldfastError, match="no checkpoint"):
        make(Trainer, []).train(resume_from_checkpoint=True)


# ---- several processes

WORKER = """
import json
import sys
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from holdfast import Plan, with_plan
from holdfast import methods as hf

torch.set_num_threads(1)
folder = sys.argv[1]
plan = Plan([getattr(hf, name)(**settings) for name, settings in json.loads(sys.argv[2])])
config = SFTConfig(
    f"{folder}/out", max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=1, seed=0,
    learning_rate=3e-3, train_sampling_strategy="sequential", use_cpu=True, bf16=False, save_strategy="no",
    logging_steps=1, disable_tqdm=True, warmup_steps=0, max_grad_norm=0.5, weight_decay=0.1,
)
trainer = with_plan(SFTTrainer)(
    AutoModelForCausalLM.from_pretrained(f"{folder}/base"), config, plan=plan,
    train_dataset=load_from_disk(f"{folder}/data"), processing_class=AutoTokenizer.from_pretrained(f"{folder}/base"),
)
trainer.train()
if trainer.accelerator.process_index == 1:
    trainer.model.save_pretrained(f"{folder}/two")
    if "ICLAnchor" in plan.names:  # the one prompt of a step belongs to the first process
        assert trainer.session.realised["ICLAnchor/examples"] == 0
"""


SHARED: dict[str, Sequence[Method]] = {
    "asides": [hf.LoRA(r=4), hf.KLToBase(weight=2.0), hf.ICLAnchor(pool=8, weight=5.0), hf.L2ToInit(alpha=10.0)],
    "rollouts": [hf.LoRA(r=4), hf.SDFT(temperature=0.15, max_completion_length=6)],
}


@pytest.mark.parametrize("name", ["asides", pytest.param("rollouts", marks=pytest.mark.long)])
def test_two_processes_equal_one(name, make, base, data, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data.save_to_disk(str(tmp_path / "data"))
    one = make(SFTTrainer, SHARED[name], steps=4, warmup_steps=0)
    one.train()
    plan = json.dumps([[m.name, m.settings()] for m in SHARED[name]])
    port = str(29500 + os.getpid() % 400)
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path), plan],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for job in jobs:
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said[-3000:]
    two = load_file(tmp_path / "two" / "adapter_model.safetensors")
    own = {n: p for n, p in one.model.named_parameters() if "lora" in n}
    assert len(two) == len(own)
    for name, p in own.items():
        torch.testing.assert_close(two[name.replace(".default", "")], p.detach(), atol=1e-6, rtol=0)


# ---- refusals


@dataclass(frozen=True, kw_only=True)
class Numbered(Method):
    """Writes the how-manieth row of the task it is into each row, and pairs them."""

    paired: bool = False

    def data(self, mix: Mix, ctx: Context) -> Mix:
        rows = [replace(r, numbers={"n": np.full(len(r.ids), float(i))}) for i, r in enumerate(mix.task)]
        rows = [replace(r, group=str(i // 2)) for i, r in enumerate(rows)] if self.paired else rows
        return replace(mix, task=rows)


def test_what_a_trainer_cannot_carry_is_refused(make, data):
    twice = {"train_dataset": dataset([token_row([5, 6, 7], 1)] * 2)}
    refused(lambda: make(SFTTrainer, [Numbered()], given=twice), "Two equal rows of task", "SFTTrainer")
    refused(lambda: make(SFTTrainer, [Numbered(paired=True)]), "group '", "SFTTrainer", "asides")
    cuts = {"packing": True, "packing_strategy": "wrapped", "max_length": 32}
    refused(lambda: make(SFTTrainer, [hf.TLTraining()], **cuts), "SFTTrainer cuts a row", "max_length")
    make(SFTTrainer, [hf.TLTraining()], packing=True, max_length=128)


def test_numbers_of_packed_rows_arrive(make):
    trainer = make(SFTTrainer, [hf.TLTraining()], packing=True, max_length=128)
    seen, plain_loss = [], trainer.session.loss

    def loss(model: Any, rows: Sequence[TokenRow], *args: Any) -> Any:
        seen.extend(rows)
        return plain_loss(model, rows, *args)

    trainer.session.loss = loss
    trainer.train()
    assert len(seen) >= 24 and all("TLTraining" in r.numbers for r in seen)


# ---- weights of the rows


def weighing(task: Sequence[TokenRow]) -> tuple[list[TokenRow], Dataset]:
    """The rows with weights, two thirds of them, and the same as a dataset with a column."""
    each = [np.linspace(0.1, 1 + i % 3, len(r.ids)) if i % 3 else np.ones(len(r.ids)) for i, r in enumerate(task)]
    rows = [weighed(r, w) for r, w in zip(task, each, strict=True)]
    return rows, dataset(task).add_column("weights", [w.tolist() for w in each])


@pytest.mark.parametrize("methods", [[], [hf.InContextMix(pool=16, share=0.5)]], ids=["none", "a mix"])
def test_weights_of_rows_equal_plain(methods, make, plain, task):
    rows, data = weighing(task)
    trainer = make(Trainer, methods, given={"train_dataset": data})
    trainer.train()
    expected = plain(methods, rows=rows)
    assert distance(weights_of(trainer.model), expected) < 1e-6 < 1e-4 < distance(plain(methods), expected)


def test_weights_in_a_list_are_found(make, task):
    rows, data = weighing(task)
    for given in (data, list(data)):
        trainer = make(Trainer, [], given={"train_dataset": given})
        batch = next(iter(trainer.get_train_dataloader()))
        assert [r.numbers.keys() for r, _ in placed_rows(batch, trainer._known)] == [
            r.numbers.keys() for r in rows[:2]
        ]


def test_weights_of_packed_rows_arrive(make, task):
    rows, data = weighing(task)
    trainer = make(SFTTrainer, [], given={"train_dataset": data}, packing=True, max_length=128)
    batch = next(iter(trainer.get_train_dataloader()))
    found = {r.key: r for r, _ in placed_rows(batch, trainer._known)}
    assert len(found) > 2 and any(r.numbers for r in found.values())
    for row in rows:
        if row.key in found:
            assert np.array_equal(found[row.key].numbers.get(WEIGHT), row.numbers.get(WEIGHT))


def test_a_collator_that_labels_rows_anew_is_refused_beside_weights(make, task, tokenizer):
    """It takes the end of a row for padding, which is the same token, so the row is another one in the batch."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    rows = [[*r.ids.tolist(), own.eos_token_id] for r in task[:6]]
    data = Dataset.from_dict({"input_ids": rows, "weights": [[1.0, *[2.0] * (len(r) - 1)] for r in rows]})
    collator = DataCollatorForLanguageModeling(own, mlm=False)
    given = {"train_dataset": data, "data_collator": collator, "processing_class": own}
    refused(lambda: make(Trainer, [], given=given), "DataCollatorForLanguageModeling labels row 0 anew", "weights")
    own.pad_token = next(
        t for t in own.get_vocab() if own.convert_tokens_to_ids(t) not in {i for r in rows for i in r}
    )
    make(Trainer, [], given=given)


def test_weights_that_cannot_be_honoured_are_refused(make, task):
    data = weighing(task)[1]
    for weights, words in (([-1.0] * 3, "one number above 0"), ([1.0] * 2, "one number above 0")):
        wrong = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]], "weights": [weights]})
        with pytest.raises(DataError, match=words):
            make(Trainer, [], given={"train_dataset": wrong})
    twice = {"input_ids": [[5, 6, 7]] * 2, "labels": [[5, 6, 7]] * 2, "weights": [[1.0] * 3, [2.0] * 3]}
    refused(lambda: make(Trainer, [], given={"train_dataset": Dataset.from_dict(twice)}), "Row 1", "other weights")
    stream = data.to_iterable_dataset()
    refused(lambda: make(Trainer, [], given={"train_dataset": stream}), "stream with a column 'weights'", "length")
    short = {"given": {"train_dataset": data}, "max_length": 16}
    refused(lambda: make(SFTTrainer, [], **short), "SFTTrainer cuts or labels", "weights", "max_length")


REFUSED = {
    "packing": (SFTTrainer, [hf.ProMoT()], {"packing": True}, {}, ("ProMoT", "SFTTrainer", "packing=False")),
    "padding free": (SFTTrainer, [hf.ProMoT()], {"padding_free": True}, {}, ("ProMoT", "SFTTrainer")),
    "peft_config": (SFTTrainer, [], {}, {"peft_config": LoraConfig()}, ("SFTTrainer", "LoRA")),
    "loss": (Trainer, [], {}, {"compute_loss_func": len}, ("Trainer", "compute_loss_func")),
    "smoothing": (Trainer, [], {"label_smoothing_factor": 0.1}, {}, ("Trainer", "label_smoothing_factor")),
    "dft": (SFTTrainer, [], {"loss_type": "dft"}, {}, ("SFTTrainer", "DFT()")),
    "batch size": (Trainer, [], {"auto_find_batch_size": True}, {}, ("auto_find_batch_size",)),
    "model_init": (Trainer, [], {}, {"model": None, "model_init": dict}, ("model=",)),
    "no tokenizer": (
        Trainer, [hf.ICLAnchor()], {}, {"processing_class": None, "data_collator": len}, ("processing_class",),
    ),
    "plan": (Trainer, [hf.LoRA(), hf.HalfFineTune()], {}, {}, ("LoRA", "HalfFineTune")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, make):
    kind, methods, options, given, words = REFUSED[name]
    refused(lambda: make(kind, methods, given=given, **options), *words)


def test_an_adapter_from_outside_is_refused(make, base):
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    refused(lambda: make(SFTTrainer, [], given={"model": adapted}), "SFTTrainer", "LoRA")


def test_a_quantised_base_is_refused_for_dense_methods(make, base):
    base.is_loaded_in_4bit = True
    refused(lambda: make(SFTTrainer, [hf.HalfFineTune()]), "HalfFineTune", "4 or 8 bits")


def test_deepspeed_hides_gradients(base, data, tmp_path):
    config = TrainingArguments(str(tmp_path), use_cpu=True)
    config.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    plan = Plan([hf.OrthogonalSubspace()])
    refused(
        lambda: with_plan(Trainer)(base, config, train_dataset=data, plan=plan),
        "OrthogonalSubspace",
        "DeepSpeed",
    )
    refused(
        lambda: with_plan(Trainer)(base, config, train_dataset=data, plan=Plan([FirstLayerOnly()])),
        "FirstLayerOnly",
        "DeepSpeed",
        "DDP or FSDP2",
    )
    config.deepspeed_plugin.zero_stage = 3
    refused(lambda: with_plan(Trainer)(base, config, train_dataset=data, plan=Plan()), "Trainer", "ZeRO-3")


def test_sharded_weights_and_expert_losses_are_refused(make, base, data, tmp_path):
    config = TrainingArguments(str(tmp_path), use_cpu=True)
    config.fsdp = "full_shard"
    refused(lambda: with_plan(Trainer)(base, config, train_dataset=data, plan=Plan()), "Trainer", "FSDP")
    base.config.output_router_logits = True
    refused(lambda: make(Trainer, []), "Trainer", "experts")


@pytest.mark.parametrize(("method", "words"), [(hf.LoRA(r=4), "lacks"), (hf.Freeze(layers=1), "learning rates")])
def test_an_optimizer_made_too_early_is_refused(method, words, make, base):
    own = torch.optim.AdamW(base.parameters(), lr=1e-3)
    trainer = make(Trainer, [method], given={"optimizers": (own, None)})
    refused(trainer.train, words)


def test_a_collator_that_relabels_is_refused(make, tokenizer):
    given = {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
    refused(lambda: make(Trainer, [hf.InContextMix(pool=8)], given=given), "InContextMix", "DataCollator")


def test_a_stream_cannot_be_mixed(make, data):
    given = {"train_dataset": data.to_iterable_dataset()}
    refused(lambda: make(SFTTrainer, [hf.InContextMix(pool=8)], given=given), "stream", "SFTTrainer")


def test_no_trainer_class(base):
    refused(lambda: with_plan(dict), "dict")
    assert with_plan(SFTTrainer) is with_plan(SFTTrainer)


def test_one_trainer_trains_once(make):
    trainer = make(Trainer, [], steps=1)
    trainer.train()
    refused(trainer.train, "already")


def test_a_method_without_effect_is_noticed(make):
    trainer = make(Trainer, [Idle()], steps=1)
    with pytest.raises(HoldfastError, match="Idle"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_the_run(make, base):
    with torch.no_grad():
        base.model.norm.weight.fill_(float("nan"))
    with pytest.raises(HoldfastError, match="step 1"):
        make(Trainer, []).train()


# ---- other trainers


@pytest.fixture
def preferences(rows) -> Dataset:
    return Dataset.from_list([{"prompt": r.prompt, "chosen": r.completion, "rejected": " nothing"} for r in rows[:8]])


ONE = r".*layers\.1\..*_proj"


def dpo(model: Any, tokenizer: Any, preferences: Dataset, folder: Any, methods: Sequence[Method]) -> Any:
    config = DPOConfig(
        str(folder), max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, learning_rate=1e-2, seed=0,
    )  # fmt: skip
    return with_plan(DPOTrainer)(
        model=model, args=config, train_dataset=preferences, processing_class=tokenizer, plan=Plan(methods)
    )


def test_dpo_takes_what_leaves_its_loss_alone(tiny_model, tokenizer, preferences, tmp_path):
    runs = []
    for merge in ([], [hf.WiSEFT(alpha=0.25)]):
        model = tiny_model(tied=False)
        trainer = dpo(model, tokenizer, preferences, tmp_path, [hf.LoRA(r=4, target_modules=ONE), *merge])
        trainer.train()
        runs.append({n: p.detach() for n, p in trainer.model.named_parameters() if "lora_B.default" in n})
    assert runs[0]
    for name, whole in runs[0].items():
        torch.testing.assert_close(runs[1][name], whole * 0.25)
        assert "layers.1" in name and whole.abs().sum()


def test_dpo_refuses_adapters_in_part(tiny_model, tokenizer, preferences, tmp_path):
    methods = [hf.LoRA(r=4), hf.Freeze(layers=1)]
    refused(
        lambda: dpo(tiny_model(tied=False), tokenizer, preferences, tmp_path, methods),
        "DPOTrainer",
        "layers.0",
    )


def test_dpo_refuses_losses(tiny_model, tokenizer, preferences, tmp_path):
    build = lambda m: lambda: dpo(tiny_model(tied=False), tokenizer, preferences, tmp_path, [hf.LoRA(), m])  # noqa: E731
    refused(build(hf.DFT()), "DFT", "DPOTrainer")
    refused(build(hf.InContextMix()), "InContextMix", "DPOTrainer")


# ---- the words of the module


def test_the_two_lines_of_the_docstring(base, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = host.__doc__.split("\n\n")[1].splitlines()
    names = {
        "model": base,
        "data": Dataset.from_list([{"prompt": r.prompt, "completion": r.completion} for r in rows[:8]]),
        "tokenizer": tokenizer,
        "plan": Plan([hf.LoRA(), hf.ICLAnchor(pool=4), hf.InContextMix(source="task"), hf.WiSEFT()]),
        "SFTConfig": partial(SFTConfig, use_cpu=True),
        "SFTTrainer": SFTTrainer,
    }  # fmt: skip
    exec("\n".join(line[4:] for line in lines), names)
    trainer = names["trainer"]
    assert trainer.session.realised["InContextMix/examples"] and trainer.session.realised["task/examples"]
    assert any("loss" in entry or "train_loss" in entry for entry in trainer.state.log_history)


def test_a_model_by_name(base, rows, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = Dataset.from_list([{"text": r.prompt + r.completion} for r in rows[:8]])
    config = SFTConfig(
        str(tmp_path / "out"), max_steps=1, use_cpu=True, model_init_kwargs={"dtype": "bfloat16"}, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = with_plan(SFTTrainer)(str(tmp_path / "base"), config, train_dataset=data, plan=Plan([hf.LoRA(r=4)]))
    trainer.train()
    assert trainer.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
