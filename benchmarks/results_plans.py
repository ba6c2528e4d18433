"""What `results.py` runs and `results_table.py` shows: tasks, plans, their order, and where each run is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "results"
STEPS, BATCH, LIMIT, SHARED_LIMIT = 60, 8, 24, 30
TEST = {"tickets": 180, "sst2": 300, "rte": 180, "agnews": 180}  # long rows cost more
TASKS = {
    "tickets": {"prompt": "{text}\nQueue:", "completion": " {queue}"},
    "sst2": {"prompt": "{sentence}\nLabel:", "completion": " {label}"},
    "rte": {"prompt": "{sentence}\nLabel:", "completion": " {label}"},
    "agnews": {"prompt": "{sentence}\nTopic:", "completion": " {label}"},
}
FULL, LORA, DEFAULT = 2e-5, 3e-4, 1.5e-3


def plans() -> dict[str, tuple[list[Any], float]]:
    """name -> (methods, learning rate)."""
    from holdfast import methods as M
    from holdfast.runs.job import default_plan

    anchor = M.ICLAnchor(weight=1.0, gold=0.0)  # the KL alone
    return {
        "default": (default_plan(), DEFAULT),
        "full": ([], FULL),
        "full lr 1e-5": ([], 1e-5),
        "full lr 5e-5": ([], 5e-5),
        "full lr 1e-4": ([], 1e-4),
        "lora": ([M.LoRA()], LORA),
        "lora lr 1e-4": ([M.LoRA()], 1e-4),
        "lora lr 1e-3": ([M.LoRA()], 1e-3),
        "lora lr 3e-3": ([M.LoRA()], 3e-3),
        "lora + replay": ([M.LoRA(), M.Replay()], LORA),
        "in-context mix": ([M.InContextMix()], FULL),
        "half fine-tuning": ([M.HalfFineTune()], FULL),
        "half fine-tuning, 3 rounds": ([M.HalfFineTune(rounds=3)], FULL),
        "promot": ([M.ProMoT()], FULL),
        "l2 to init": ([M.L2ToInit()], FULL),
        "kl to base (task)": ([M.KLToBase()], FULL),
        "anchor (weight 1), full": ([anchor], FULL),
        "anchor (weight 1), lora": ([M.LoRA(), anchor], LORA),
        "orthogonal subspace": ([M.OrthogonalSubspace()], FULL),
        "eaft": ([M.EAFT()], FULL),
        "gere": ([M.GeRe()], FULL),
        "lift": ([M.LIFT()], FULL),
        "finch": ([M.FINCH()], FULL),
        "class separability": ([M.ClassSeparability(every=10)], FULL),
        "uds": ([M.UDS()], FULL),
        "curriculum": ([M.Curriculum()], FULL),
        "masked thought": ([M.MaskedThought()], FULL),
        "lora + replay + mftcoder": ([M.LoRA(), M.Replay(), M.MFTCoder()], LORA),
        "spiel": ([M.SpIEL()], FULL),
        "lt-sft": ([M.LTSFT()], FULL),
        "control llm": ([M.ControlLLM()], FULL),
        "s3ft": ([M.S3FT(max_new_tokens=16)], FULL),  # "contains": with "exact" nothing would change
        "sdft": ([M.LoRA(), M.SDFT(max_completion_length=8)], LORA),
        "s2ft": ([M.S2FT()], LORA),
        "bottleneck adapter": ([M.BottleneckAdapter()], LORA),
        "connected adapter": ([M.ConnectedAdapter()], LORA),
        "ssf": ([M.SSF()], 1e-3),
        "peqa": ([M.PEQA()], FULL),
        "gs-lora": ([M.GSLoRA()], LORA),
        "loramoe + replay": ([M.LoRAMoE(), M.Replay()], LORA),
        "anchor (weight 1), lora lr 1e-3": ([M.LoRA(), anchor], 1e-3),
        "anchor (weight 1), full lr 5e-5": ([anchor], 5e-5),
    }


AFTERWARDS = ("wise-ft", "lines", "ties, one model")  # closed-form merges of the "full" run: no training of their own
TABLE = [
    "base",
    "default",
    "full",
    "lora",
    "lora lr 1e-3",
    "lora + replay",
    "in-context mix",
    "half fine-tuning",
    "half fine-tuning, 3 rounds",
    "promot",
    "l2 to init",
    "kl to base (task)",
    "anchor (weight 1), full",
    "anchor (weight 1), lora",
    "orthogonal subspace",
    "eaft",
    "gere",
    "lift",
    "finch",
    "class separability",
    "uds",
    "curriculum",
    "masked thought",
    "lora + replay + mftcoder",
    "spiel",
    "lt-sft",
    "control llm",
    "s3ft",
    "sdft",
    "s2ft",
    "bottleneck adapter",
    "connected adapter",
    "ssf",
    "peqa",
    "loramoe + replay",
    "gs-lora",
    *AFTERWARDS,
]


SWEEP = {  # learning rates beside 2e-5 (full) and 3e-4 and 1e-3 (LoRA); tickets need higher ones in 60 steps
    "sst2": (
        "full lr 1e-5",
        "full lr 5e-5",
        "lora lr 1e-4",
        "anchor (weight 1), lora lr 1e-3",
        "anchor (weight 1), full lr 5e-5",
    ),
    "tickets": ("full lr 5e-5", "full lr 1e-4", "lora lr 3e-3"),
}


CLOSE = ("in-context mix", "promot", "anchor (weight 1), lora", "kl to base (task)")  # kept the most with one seed
TOP = ("full lr 1e-4", "lora lr 3e-3")  # of the sweep, the rates that compete for the best plain run


def wanted(seeds: int) -> list[tuple[str, str, int]]:
    """(task, method, seed) in the order of need."""
    core = ("default", "lora lr 1e-3", "full", "lora")
    rest = [n for n in plans() if " lr " not in n and n not in core]
    rest.sort(key=lambda n: n not in CLOSE)
    order = [(t, "base", 0) for t in TASKS]
    order += [(t, n, 0) for n in core for t in SWEEP]
    order += [(t, n, 0) for t, names in SWEEP.items() for n in names]
    order += [(t, n, 1) for n in core for t in SWEEP if seeds > 1]
    order += [(t, n, 1) for t, names in SWEEP.items() for n in names if n in TOP and seeds > 1]
    order += [(t, n, 0) for n in core[:3] for t in ("rte", "agnews")]
    order += [(t, n, 0) for n in rest for t in SWEEP]
    return order + [(t, n, s) for s in range(1, seeds) for n in (*core, *rest) for t in SWEEP if s > 1 or n in rest]


def path_of(task: str, method: str, seed: int) -> Path:
    return OUT / f"{task}.{method.replace(' ', '_').replace(',', '').replace('(', '').replace(')', '')}.{seed}.json"
