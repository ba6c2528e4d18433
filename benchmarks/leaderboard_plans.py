"""What the leaderboard measures: tasks, methods with their learning rates, and how much of everything.

A method is one line of `plans`. Its learning rate names a grid of three (`rates`), one grid for all methods that train
the model's own weights and one for all that train LoRA, so that none is favoured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "results"
FOLDER = OUT / "leaderboard"
SHARED = HERE.parent.parent / "shared" / "data"  # not shipped
STEPS, BATCH, LIMIT, SHARED_LIMIT, SHOTS = 60, 8, 24, 30, 8
CHOOSES, SECOND = "sst2", "tickets"  # the rate is chosen on the one, and used on all others
WIDE = ("rte", "agnews", "talk")  # for the best and the plain rows only
TEST = {"tickets": 180, "sst2": 300, "rte": 180, "agnews": 180, "talk": 120}  # long rows cost more
TASKS = {
    "tickets": {"prompt": "{text}\nQueue:", "completion": " {queue}"},
    "sst2": {"prompt": "{sentence}\nLabel:", "completion": " {label}"},
    "rte": {"prompt": "{sentence}\nLabel:", "completion": " {label}"},
    "agnews": {"prompt": "{sentence}\nTopic:", "completion": " {label}"},
}
FULL, LORA, DEFAULT = 2e-5, 3e-4, 1.5e-3
GRIDS = {FULL: (2e-5, 5e-5, 1e-4), LORA: (3e-4, 1e-3, 3e-3), DEFAULT: (5e-4, 1.5e-3, 3e-3)}
FIRST = ("default", "full", "lora")  # measured before all others
PLAIN = ("full", "lora")


def rates(learning_rate: float) -> tuple[float, float, float]:
    """The three rates of a method that has this one in `plans`."""
    third, three = (float(f"{learning_rate * f:.2g}") for f in (1 / 3, 3))
    return GRIDS.get(learning_rate, (third, learning_rate, three))


SUITES = {"in-context": LIMIT, "language": 6, "knowledge": 24, "copying": 8, "recognition": 8}
MORE = {"instructions": 6, "format": 6, "reasoning": 6, "safety": 6}  # the model writes: these cost the most


@dataclass(frozen=True)
class Size:
    """How much is trained and asked. suites: name -> items of each task; more: of the base and of second seeds."""

    steps: int = STEPS
    batch: int = BATCH
    test: Mapping[str, int] = field(default_factory=lambda: TEST)
    validation: int = 200
    divergence: int = 100  # test rows on which the KL to the base is taken
    shared: int = SHARED_LIMIT
    shots: int = SHOTS
    suites: Mapping[str, int] = field(default_factory=lambda: SUITES)
    more: Mapping[str, int] = field(default_factory=lambda: MORE)


def plans() -> dict[str, tuple[list[Any], float]]:
    """name -> (methods, learning rate)."""
    from holdfast import methods as M
    from holdfast.runs.job import default_plan

    anchor = M.ICLAnchor(weight=1.0, gold=0.0)  # the KL alone
    return {
        "default": (default_plan(), DEFAULT),
        "full": ([], FULL),
        "lora": ([M.LoRA()], LORA),
        "lora + replay": ([M.LoRA(), M.Replay()], LORA),
        "in-context mix": ([M.InContextMix()], FULL),
        "half fine-tuning": ([M.HalfFineTune()], FULL),
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
        "corda": ([M.CorDA()], LORA),
        "corda, instruction-previewed": ([M.CorDA(corda_method="ipm")], LORA),
        "flow": ([M.FLOW()], FULL),
        "ewc": ([M.EWC()], FULL),
        "cpo penalty": ([M.CPOPenalty()], FULL),
        "feature distillation": ([M.FeatureDistillation()], FULL),
        "s2ft": ([M.S2FT()], LORA),
        "half fine-tuning, 3 rounds": ([M.HalfFineTune(rounds=3)], FULL),
        "moving average": ([M.MovingAverage(decay=0.9)], FULL),  # 0.25, the default, is the last step or two
        "adaptive ema": ([M.AdaptiveEMA()], FULL),
        "fpf": ([M.FPF()], FULL),
        "many-shot rows": ([M.ManyICL(max_tokens=512)], FULL),
        "skill-it, with replay": ([M.Replay(), M.SkillIt(every=10)], FULL),
        "vr-lwf": ([M.VRLwF()], FULL),
        "fait": ([M.FAIT(max_new_tokens=16)], FULL),
        "dart": ([M.DART(max_new_tokens=16)], FULL),
        "morepair": ([M.MORepair(max_new_tokens=32)], FULL),
        "clear": ([M.CLEAR(max_new_tokens=16)], FULL),
        "got-d": ([M.GOTD()], FULL),
        "non-instructional": ([M.NonInstructional()], FULL),
        "response tuning": ([M.ResponseTuning()], FULL),
        "pcp": ([M.PCP()], FULL),
        "anchored decay": ([M.AnchoredDecay()], FULL),
        "rif": ([M.RIF(max_new_tokens=16)], FULL),
        "on-policy kl": ([M.LoRA(), M.OnPolicyKL(max_new_tokens=16)], LORA),
        "bottleneck adapter": ([M.BottleneckAdapter()], LORA),
        "connected adapter": ([M.ConnectedAdapter()], LORA),
        "ssf": ([M.SSF()], 1e-3),
        "peqa": ([M.PEQA()], FULL),
        "loramoe + replay": ([M.LoRAMoE(), M.Replay()], LORA),
        "eva": ([M.EVA()], LORA),
        "locft": ([M.LocFT()], 5e-4),
        "o-lora, 64 directions of the base": ([M.OrthogonalLoRA(principal=64, hard=True)], LORA),
        "coso": ([M.CoSO()], FULL),
        "adalora": ([M.AdaLoRA()], LORA),
        "greentrainer": ([M.GreenTrainer()], FULL),
        "gs-lora": ([M.GSLoRA()], LORA),
        "prompt tuning": ([M.PromptTuning()], FULL),  # it has a rate of its own
        "prefix tuning": ([M.PrefixTuning(learning_rate=None)], 5e-3),
        "phrasing prompt": ([M.PhrasingPrompt()], FULL),  # it has a rate of its own
        "ift": ([M.IFT()], FULL),
        "dft": ([M.DFT()], FULL),
        "anchored sft": ([M.AnchoredSFT()], FULL),
        "tl-training": ([M.TLTraining()], FULL),
        "freeze": ([M.Freeze()], FULL),  # lower layers learn more slowly
        "coba": ([M.LoRA(), M.CoBa(warmup=10, history=20, share=0.1)], LORA),
        "wise-ft": ([M.WiSEFT()], FULL),
        "lines": ([M.LiNeS()], FULL),
        "ties, one model": ([M.TIES()], FULL),
        "breadcrumbs": ([M.Breadcrumbs()], FULL),
        "dare": ([M.DARE()], FULL),
        "dg-hard": ([M.DGHard()], FULL),
        "intruder reduction": ([M.IntruderReduction()], FULL),
        "slerp": ([M.SLERP()], FULL),
        "task arithmetic": ([M.TaskArithmetic()], FULL),
    }
