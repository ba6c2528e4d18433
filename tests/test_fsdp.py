"""FSDP2 in the Hugging Face host: two processes that share the weights give the weights of one that has them all."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from cases import CASES, COVERING, GENERAL, Weights, late, stands, token_rows
from holdfast import Plan, with_plan
from holdfast import methods as hf
from holdfast.engine import processes
from holdfast.engine.shards import whole
from holdfast.errors import PlanError
from holdfast.hosts.hf_refuse import fsdp_version
from holdfast.hosts.hf_setup import mixes
from holdfast.method import Method, canonical
from test_law_rows import Averaged, Unlikely
from test_shard import CLOSE, apart, close, together
from tiny import build_model, build_tokenizer, ticket_rows
from trainers import Watcher, dataset, refused

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
LORA = hf.LoRA(r=4, lora_alpha=8)
HALF = {"share": 0.5, "max_tokens": 32, "sources": (GENERAL,)}  # 48 rows an epoch: no short last step, which
# accelerate fills up with the first rows when there are several processes


@dataclass(frozen=True, kw_only=True)
class Centred(Method):
    """A grad site that needs the whole matrix: the mean over its rows is taken out."""

    def grad(self, name: str, grad: torch.Tensor, state: Any) -> torch.Tensor:
        return grad - grad.mean(0, keepdim=True)


PLANS: dict[str, Sequence[Method]] = {
    "none": [],
    **{c.name: [c.method] for c in CASES if not (c.needs_rows or c.picks or "live_logits" in c.method.needs)},
    "LoRA": [LORA],
    "InContextMix": [hf.InContextMix(share=0.5, pool=8)],
    "Replay": [hf.Replay(**HALF)],
    "CoBa": [hf.CoBa(warmup=2, share=0.25, cut=0.3)],  # 18 of the tickets train: 24 rows an epoch
    "CPOPenalty": [hf.CPOPenalty(weight=1e3)],  # logs are compared to a fixed number of digits
    "SkillIt": [hf.SkillIt(every=2, share=0.25, cut=0.3)],
    "ManyICL": [hf.ManyICL(share=0.5, unit="examples", max_tokens=96, pool=8)],  # the next too: 48 rows an epoch
    "GOTD": [hf.GOTD(share=0.5, sources=("holdfast:general/text.jsonl",), select=8, pool=24, max_tokens=32)],
    "NonInstructional": [hf.NonInstructional(share=0.5, max_tokens=48, pool=24)],
    "PCP": [hf.PCP(share=0.5)],
    "CLEAR": [hf.CLEAR(mix=0.0, gamma=1.0, most=1 / 3, samples=1, max_new_tokens=2)],  # 16 rows stay
    "RIF": [hf.RIF(verifier="cases:two_thirds", max_new_tokens=3, temperature=5.0)],  # here too
    "LoRA with all": [LORA, hf.KLToBase(weight=2.0), hf.ICLAnchor(pool=8), hf.L2ToInit(alpha=10.0), hf.WiSEFT()],
    "LoRA in part": [LORA, hf.Freeze(layers=1), hf.LiNeS(alpha=0.25)],
    "matrices": [hf.OrthogonalSubspace(mode="factored"), hf.HalfFineTune(), hf.L2ToInit(alpha=10.0)],
    "grad": [Centred()],
    "balanced": [hf.Replay(**HALF), hf.MFTCoder(inside="samples")],
    "left out": [Unlikely(), hf.Replay(**HALF)],
    "by row": [Averaged(grouped=True)],
    "by source": [Averaged(per="source")],
    "feedback": [Watcher()],
}
REFUSED = [
    n
    for n, plan in PLANS.items()
    if any(m.holds_out or m.stages() or {"rollouts", "replace"} & {*m.sites()} for m in plan)
]
CUT = {n: m for n, m in PLANS.items() if n not in REFUSED}
TWICE = {c.name for c in CASES} & set(CUT)  # two processes that cut the weights try these already
SAVED = {"dense": PLANS["matrices"], "adapter": PLANS["LoRA in part"]}
FORMATS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
VARIANTS: dict[str, dict[str, Any]] = {  # of "LoRA with all" and "matrices" under FSDP
    "SFTTrainer": {"kind": "SFTTrainer"},
    "watched": {"eval_strategy": "steps", "eval_steps": 2},
    "recomputed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "bf16": {"bf16": True},
    "tied": {"tied": True},
    "gathered till the backward": {"fsdp_config": {"reshard_after_forward": False}},
    "FSDP's own recomputing": {"fsdp_config": {"activation_checkpointing": True}},
}


def classes(name: str) -> tuple[type, type]:
    """(trainer, its arguments) by name. TRL is loaded where it is asked for: every process would wait for it."""
    if name == "Trainer":
        return Trainer, TrainingArguments
    import trl

    return getattr(trl, name), getattr(trl, name.replace("Trainer", "Config"))


def trainer(
    methods: Sequence[Method],
    folder: Path,
    ranks: int,
    fsdp: bool,
    kind: str = "Trainer",
    on_cpu: bool = True,
    tied: bool = False,
    **more: Any,
) -> Any:
    """A trainer on the tickets in their order, eight rows a step however many processes there are.

    on_cpu: accelerate offers FSDP to processes with GPUs only, though torch cuts weights over gloo as well.
    """
    tokenizer = build_tokenizer()
    options = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4 // ranks, "warmup_steps": 2,
        "gradient_accumulation_steps": 2, "seed": 0, "report_to": [],
        "train_sampling_strategy": "random" if any(map(mixes, methods)) else "sequential",
        "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, **more,
    }  # fmt: skip
    config = {"version": 2, "state_dict_type": options.pop("state_dict_type", "FULL_STATE_DICT")}
    config |= options.pop("fsdp_config", {})
    if fsdp:
        options |= {"fsdp": True, "fsdp_config": config}
    data = dataset(token_rows(ticket_rows(), tokenizer))
    given = {"model": build_model(tied), "train_dataset": data, "processing_class": tokenizer}
    if kind == "Trainer":
        given["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
    if "eval_strategy" in more:
        given["eval_dataset"] = data.select(range(4))
    trains, config_of = classes(kind)
    args = config_of(**options)
    if fsdp and on_cpu:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return with_plan(trains)(args=args, plan=Plan(methods), **given)


def weights_of(built: Any) -> Weights:
    """Whole weights by canonical name; a collective call where they are cut."""
    return {canonical(n): whole(p.detach()).clone() for n, p in built.model.named_parameters()}


def logs_of(built: Any) -> list[dict[str, float]]:
    """Loss and its terms of every step; terms that are 0, but for rounding, stand in some logs only."""
    kept = [h for h in built.state.log_history if "loss" in h]
    return [{k: v for k, v in h.items() if k.startswith("loss") and abs(v) > 1e-6} for h in kept]


class Runs:
    """What one process of several finds, in files for the test to read."""

    def __init__(self, folder: Path):
        self.folder, self.facts = folder, {}
        self.rank, self.ranks = processes.world()

    def train(self, name: str, methods: Sequence[Method], fsdp: bool, resume: Path | None = None, **more: Any) -> Any:
        built = trainer(methods, self.folder / name, self.ranks, fsdp, **more)
        built.train(resume_from_checkpoint=resume and str(resume))
        save_file(weights_of(built), self.folder / f"{name}.{self.rank}.safetensors")
        cut = [p.to_local().numel() / p.numel() for p in built.session.params.values() if fsdp and p.ndim == 2]
        self.facts[name] = {"logs": logs_of(built), "cut": sorted(set(cut))}
        return built

    def equal(self) -> None:
        names = json.loads((self.folder / "wanted.json").read_text())
        for name in (n for n in PLANS if n in names["ddp"]):  # first: FSDP stays on in a process that had it
            self.train(f"ddp {name}", PLANS[name], False)
        with pytest.raises(PlanError) as caught:
            trainer([], self.folder, self.ranks, True, on_cpu=False)
        self.facts["not on"] = str(caught.value)
        for name in (n for n in CUT if n in names["fsdp"]):
            self.train(f"fsdp {name}", CUT[name], True)

    def variants(self) -> None:
        for name, more in VARIANTS.items():
            for plan in ("LoRA with all", "matrices"):
                built = self.train(f"fsdp {plan} {name}", PLANS[plan], True, **more)
                if more.get("kind"):
                    built.save_model(str(self.folder / f"saved {plan}"))

    def save(self, formats: Sequence[str] = FORMATS, fsdp: bool = True) -> None:
        for name, methods in SAVED.items():
            for kind in formats:
                saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "state_dict_type": kind}
                self.train(f"{self.ranks} {name} {kind}", methods, fsdp, **saving)

    def resume(self, formats: Sequence[str] = FORMATS, fsdp: bool = True) -> None:
        for name, methods in SAVED.items():
            for kind in formats:
                saved = f"{3 - self.ranks} {name} {kind}"
                at = self.folder / saved / "checkpoint-4"
                self.train(f"resumed {saved}", methods, fsdp, at, state_dict_type=kind, max_steps=6)

    def save_ddp(self) -> None:
        self.save(["ddp"], False)

    def resume_ddp(self) -> None:
        self.resume(["ddp"], False)


def two_run(folder: Path, *parts: str, ranks: int = 2) -> list[Any]:
    together(ranks, __file__, str(folder), *parts)
    return [json.loads((folder / f"{'-'.join(parts)}.{r}.json").read_text()) for r in range(ranks)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, wanted, request) -> Any:
    folder, asked = tmp_path_factory.mktemp("fsdp"), wanted(request, "name")
    names = {kind: [n for test, n in asked if test.startswith(f"test_{kind}")] for kind in ("ddp", "fsdp")}
    (folder / "wanted.json").write_text(json.dumps(names))
    return folder, two_run(folder, "equal")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Any:
    """The trainer of one process with whole weights, remembered."""
    known: dict[str, tuple[Weights, Any]] = {}

    def get(name: str, methods: Sequence[Method], **more: Any) -> tuple[Weights, Any]:
        key = f"{name} {more}"
        if key not in known:
            built = trainer(methods, tmp_path_factory.mktemp("one"), 1, False, **more)
            built.train()
            known[key] = weights_of(built), logs_of(built)
        return known[key]

    return get


def distance(folder: Path, name: str, weights: Weights, ranks: int = 2) -> float:
    """`apart` of the weights of several processes and of one; the several must agree to the last bit."""
    found = [load_file(folder / f"{name}.{r}.safetensors") for r in range(ranks)]
    assert all(torch.equal(found[0][n], other[n]) for other in found for n in found[0])
    far = apart(found[0], weights, most=0.02)
    print(f"{name}: {far:.1e}")
    return far


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] if n in TWICE else late(n, COVERING)) for n in PLANS]
)
def test_ddp_gives_the_weights_of_one(name, ran, one):
    weights, logs = one(name, PLANS[name])
    assert distance(ran[0], f"ddp {name}", weights) < CLOSE
    assert close(ran[1][0][f"ddp {name}"]["logs"], logs)


@pytest.mark.parametrize("name", stands(CUT))
def test_fsdp_gives_the_weights_of_one(name, ran, one):
    weights, logs = one(name, PLANS[name])
    assert distance(ran[0], f"fsdp {name}", weights) < CLOSE
    facts = ran[1][0][f"fsdp {name}"]
    assert facts["cut"] == [0.5] and close(facts["logs"], logs)
    none, _ = one("none", [])
    if name != "none" and none.keys() == weights.keys():  # else the test could not see a method that does nothing
        assert max((none[n] - w).abs().max().item() for n, w in weights.items()) > 1e-4


@pytest.fixture(scope="module")
def varied(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("variants")
    two_run(folder, "variants")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("plan", ["LoRA with all", "matrices"])
@pytest.mark.parametrize("name", VARIANTS)
def test_fsdp_variants(name, plan, varied, one):
    weights, _ = one(plan, PLANS[plan], **({} if name == "bf16" else VARIANTS[name]))
    far = distance(varied, f"fsdp {plan} {name}", weights)
    assert 1e-5 < far < 0.02 if name == "bf16" else far < 1e-5


@pytest.mark.long
def test_the_saved_model_is_whole(varied, one):
    weights, _ = one("matrices", PLANS["matrices"])
    saved = load_file(varied / "saved matrices" / "model.safetensors")
    assert all(torch.allclose(saved[n], w, atol=1e-5) for n, w in weights.items())
    adapter = load_file(varied / "saved LoRA with all" / "adapter_model.safetensors")
    lora, _ = one("LoRA with all", PLANS["LoRA with all"])
    assert len(adapter) == sum("lora_" in n for n in lora)


# ---- resuming


@pytest.mark.long  # three starts of processes
def test_a_checkpoint_resumes_with_another_number_of_processes(tmp_path, one):
    two_run(tmp_path, "save_ddp", "save")  # FSDP last: it stays on in a process that had it
    two_run(tmp_path, "save_ddp", "resume_ddp", "save", "resume", ranks=1)
    two_run(tmp_path, "resume_ddp", "resume")
    for name, methods in SAVED.items():
        weights, _ = one(name, methods, max_steps=6)
        for kind in ("ddp", *FORMATS):
            assert distance(tmp_path, f"resumed 2 {name} {kind}", weights, ranks=1) < 1e-5
            assert distance(tmp_path, f"resumed 1 {name} {kind}", weights) < 1e-5


# ---- refusals


def test_fsdp_that_does_not_come_is_noticed(ran):
    """On CPU accelerate leaves the weights whole and says nothing."""
    for facts in ran[1]:
        assert all(word in facts["not on"] for word in ("Trainer", "FSDP", "GPUs", "DDP"))


def built_with(methods: Sequence[Method], folder: Path, kind: str = "Trainer", **config: Any) -> Any:
    """Arguments with FSDP as they are read before any process group is looked for."""
    trains, config_of = classes(kind)
    options = config_of(str(folder), use_cpu=True, report_to=[])
    options.fsdp, options.fsdp_plugin_args = True, {"fsdp_version": 2, **config}
    data = dataset(token_rows(ticket_rows(), build_tokenizer()))
    return with_plan(trains)(model=build_model(), args=options, train_dataset=data, plan=Plan(methods))


def test_refused_under_fsdp(tmp_path, monkeypatch):
    replacing = {c.name for c in CASES if "replace" in c.method.sites()}
    others = {
        "ProMoT",
        "PromptTuning",
        "PrefixTuning",
        "LTSFT",
        "PCP",
        "FPF",
        "CoBa",
        "SkillIt",
        "feedback",
        "SDFT",
        "OnPolicyKL",
    }
    assert others | replacing == set(REFUSED) and len(replacing) > 3
    refused(lambda: built_with([hf.ProMoT()], tmp_path), "Trainer", "FSDP", "ProMoT", "DDP")
    refused(lambda: built_with([hf.LTSFT()], tmp_path), "Trainer", "FSDP", "LTSFT", "stages", "DDP")
    refused(lambda: built_with([hf.CoBa()], tmp_path), "Trainer", "FSDP", "CoBa", "DDP")
    refused(lambda: built_with([hf.UDS()], tmp_path), "Trainer", "FSDP", "UDS", "DDP")
    refused(lambda: built_with([hf.SDFT()], tmp_path), "Trainer", "FSDP", "SDFT", "DDP")
    refused(lambda: built_with([LORA], tmp_path, "DPOTrainer"), "DPOTrainer", "FSDP", "DDP")
    refused(lambda: built_with([], tmp_path, fsdp_version=1), "Trainer", "FSDP1", "version")
    refused(lambda: built_with([], tmp_path, cpu_offload=True), "Trainer", "cpu_offload")
    refused(lambda: built_with([], tmp_path, cpu_ram_efficient_loading=True), "Trainer", "cpu_ram_efficient_loading")


def test_fsdp_of_accelerate_launch_is_seen(tmp_path, monkeypatch):
    options = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert fsdp_version(options) == 0
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert fsdp_version(options) == 1
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert fsdp_version(options) == 2
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    data = dataset(token_rows(ticket_rows(), build_tokenizer()))
    build = lambda: with_plan(Trainer)(model=build_model(), args=options, train_dataset=data, plan=Plan())  # noqa: E731
    refused(build, "Trainer", "cpu_offload")


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.start()
    runs = Runs(Path(sys.argv[1]))
    for part in sys.argv[2:]:
        getattr(runs, part)()
    (runs.folder / f"{'-'.join(sys.argv[2:])}.{runs.rank}.json").write_text(json.dumps(runs.facts))
