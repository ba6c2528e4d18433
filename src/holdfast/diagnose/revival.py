"""The wrapper test: does a very short tuning bring a lost ability back? Then it was covered, not erased.

The tuned model and, as control, the base get the same STEPS steps of LoRA on few-shot rows of anchor tasks. Before and
after, both answer held-out items of other tasks; nothing that is measured was trained on. With scores b0, t0 before
and b1, t1 after:

    back = (t1 - t0 - max(0, b1 - b0)) / (b0 - t0)     part of the loss that comes back

What the steps teach the base too is teaching, not revival, and is taken off.
Source: Jain et al. 2024 (arXiv 2311.12786): fine-tuning often puts a thin wrapper over an ability, and tuning it back
takes few steps. The paper compares speeds with a model that never had the ability; there is none for a pretrained
base, so a quick return shows that the way back is short, and no more. A slow one may only need other data or steps.
Cost: two short trainings (some 80 rows of under MAX_TOKENS tokens each) and four small measurements; only two of
these and no training where nothing was lost. Both models are left bit for bit as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose.formats import TASKS, loss_status
from holdfast.engine.pack import TokenRow
from holdfast.errors import ModelError
from holdfast.hosts.plain import Training, train
from holdfast.measure import stats
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Ask, Suite
from holdfast.measure.suites.in_context import suite_of
from holdfast.measure.tasks import held_out_tasks
from holdfast.methods.adapt.lora import LoRA
from holdfast.methods.data.in_context_mix import InContextMix
from holdfast.plan import Plan
from holdfast.services import Context
from holdfast.session import Session

STEPS, BATCH = 20, 4
LEARNING_RATE = 1e-3  # ours: the paper's range is for full tuning and longer runs
MAX_TOKENS = 64  # longest row that is preferred
SHOTS, ITEMS = 4, 12  # demonstrations and questions of each held-out task
FORMATS_ASKED = ("qa", "io")
MOST = 0.5  # ours: at least half of the loss must come back for 'covered'


@dataclass(frozen=True)
class Scores:
    """Scores of the same held-out items (N,) before and after the short tuning; None where it was not needed."""

    base: Sequence[float]
    tuned: Sequence[float]
    base_after: Sequence[float] | None = None
    tuned_after: Sequence[float] | None = None


@dataclass(frozen=True)
class Judgement:
    """What the scores say.

    status: 'not measurable', 'kept', 'unclear', 'covered', 'partly covered' or 'not revived'.
    left: share of the base left before the short tuning. back: part of the loss that came back; gain: its paired
    interval in points of score, control taken off.
    """

    status: str
    left: float = math.nan
    back: float = math.nan
    gain: stats.Estimate | None = None


# ---- tuning


def anchor_rows(tokenizer: Any, seed: int = 0, n: int = STEPS * BATCH) -> list[TokenRow]:
    """n few-shot rows of anchor tasks, every answer a target; short ones first where the tokenizer allows."""
    maker, ctx = InContextMix(shots=(1, 3), supervision="all", seed=seed), Context(None, tokenizer, seed)
    rows = [maker.row(i, ctx) for i in range(3 * n)]
    short = [r for r in rows if len(r.ids) <= MAX_TOKENS]
    return (short if len(short) >= n else sorted(rows, key=lambda r: len(r.ids)))[:n]


@contextmanager
def briefly_tuned(
    model: Any, tokenizer: Any, rows: Sequence[TokenRow], seed: int = 0, learning_rate: float = LEARNING_RATE
) -> Iterator[Any]:
    """The model after STEPS steps on `rows` with an adapter; on leaving, the model is bit for bit as before.

    Raises:
        ModelError: the model carries an adapter already, which taking ours off would take off too.
    """
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"The model {type(model).__name__} still carries an adapter, so a second one cannot be tried on it.",
            "Merge the adapter into the model first.",
        )
    session = Session(Plan([LoRA(r=8, lora_alpha=16)]), model, Context(model, tokenizer, seed, total_steps=STEPS))
    half = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else None
    settings = Training(
        STEPS, BATCH, learning_rate=learning_rate, warmup_steps=0, seed=seed, autocast=half, save_steps=0
    )
    with _flags_kept(model):
        try:
            with torch.random.fork_rng(devices=[]):
                train(session, session.mix(rows), settings)
            yield session.model
        finally:
            if session.model is not model:
                session.model.unload()


@contextmanager
def _flags_kept(model: Any) -> Iterator[None]:
    """Put back what trains and what is in training mode; the weights themselves are frozen throughout."""
    trains = {p: p.requires_grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    try:
        yield
    finally:
        for p, flag in trains.items():
            p.requires_grad_(flag)
        for m, flag in modes.items():
            m.training = flag


def revive(case: Case, suite: Suite, rows: Sequence[TokenRow], learning_rate: float = LEARNING_RATE) -> Scores:
    """Measure, tune briefly, measure again; without tuning where no loss is shown."""
    base, tuned = (_scores(m, case.tokenizer, suite) for m in (case.base, case.tuned))
    if not stats.measurable(base) or loss_status(base, tuned) != "lost":
        return Scores(base, tuned)
    after = []
    for model in (case.base, case.tuned):
        with briefly_tuned(model, case.tokenizer, rows, case.seed, learning_rate) as changed:
            after.append(_scores(changed, case.tokenizer, suite))
    return Scores(base, tuned, *after)


def _scores(model: Any, tokenizer: Any, suite: Suite) -> list[float]:
    measured = score_suite(model, tokenizer, suite)
    return [float(i["correct"]) for t in measured["tasks"] for i in t["items"]]


# ---- judging


def judge(s: Scores) -> Judgement:
    """Say from scores alone whether the loss came back."""
    if not stats.measurable(s.base):
        return Judgement("not measurable")
    b0, t0 = np.asarray(s.base, dtype=float), np.asarray(s.tuned, dtype=float)
    left, status = float(t0.mean() / b0.mean()), loss_status(b0, t0)
    if status != "lost":
        return Judgement(status, left)
    assert s.base_after is not None and s.tuned_after is not None, "a loss is always put to the test"
    b1, t1 = np.asarray(s.base_after, dtype=float), np.asarray(s.tuned_after, dtype=float)
    taught = b1 - b0 if b1.mean() > b0.mean() else np.zeros_like(b0)
    gain = stats.paired(t0 + taught, t1)
    back = gain.value / float(b0.mean() - t0.mean())
    if gain.low <= 0:
        return Judgement("not revived", left, back, gain)
    return Judgement("covered" if back >= MOST else "partly covered", left, back, gain)


# ---- telling


def diagnose(case: Case) -> Finding:
    """Try to bring the lost held-out tasks back in STEPS steps; some 3000 tokens are trained on twice."""
    tasks = held_out_tasks(TASKS)
    suite = suite_of(tasks, Ask(case.tokenizer, SHOTS, ITEMS, case.seed), FORMATS_ASKED, "revival")
    return report(revive(case, suite, anchor_rows(case.tokenizer, case.seed)))


def report(scores: Scores) -> Finding:
    """The finding for measured scores."""
    v = judge(scores)
    numbers = {"left": v.left, "back": v.back, **{k: float(np.mean(x)) for k, x in vars(scores).items() if x}}
    return Finding(
        name="revival",
        finding=_sentence(v),
        detail=_detail(v, len(scores.base)),
        table=_table(scores),
        scores={k: x for k, x in numbers.items() if math.isfinite(x)},
    )


def _sentence(v: Judgement) -> str:
    left, back = f"{100 * v.left:.0f} %", f"{100 * min(1.0, max(0.0, v.back)):.0f} %"
    return {
        "not measurable": "Cannot tell: the base does too little of these tasks to lose it.",
        "kept": f"{NOTHING}: on these items {left} of the base is left, so there is nothing to bring back.",
        "unclear": f"Cannot tell: {left} of the base is left, on too few items to call it a loss.",
        "covered": f"Covered rather than erased: {STEPS} short steps on other tasks bring {back} of the loss back.",
        "partly covered": f"Covered in part: {STEPS} short steps on other tasks bring {back} of the loss back.",
        "not revived": f"Not revived: {STEPS} short steps on other tasks do not bring the loss back ({back} of it).",
    }[v.status]


def _detail(v: Judgement, num_items: int) -> str:
    text = f"{num_items} held-out questions with {SHOTS} examples each; none of their tasks is trained on."
    if v.gain is None:
        return text
    text += (
        f" Both models got the same {STEPS} steps of {BATCH} few-shot rows of anchor tasks with an adapter that is "
        f"taken off again. Gain beyond the base's: {v.gain.value:+.2f} ({v.gain.low:+.2f} to {v.gain.high:+.2f})."
    )
    if v.status == "not revived":
        return text + " This does not prove it erased: more steps or other rows may still bring it back."
    return text + (
        " A quick return shows that the way back is short. It does not show which weights cover the ability, and a "
        "model that learns these tasks fast from nothing would look the same."
    )


def _table(s: Scores) -> list[list[Any]]:
    def row(name: str, before: Sequence[float], after: Sequence[float] | None) -> list[Any]:
        return [name, f"{np.mean(before):.2f}", "-" if after is None else f"{np.mean(after):.2f}"]

    head = ["model", "before", f"after {STEPS} steps"]
    return [head, row("base", s.base, s.base_after), row("tuned", s.tuned, s.tuned_after)]
