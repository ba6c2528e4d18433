"""Format or ability: is the ability gone, or only hidden in the ways the tuned model is usually asked?

The same held-out items with the same demonstrations are asked in every format of `fewshot` and in conjugate frames,
which keep the task's words and change what stands around them (another language, capitals, JSON, an answer in a chat).
With b and t the scores of base and tuned on an item, f a frame and u the mean over the other usual formats:

    gain  = t_f - t_u                        the tuned model does better in f
    extra = (t_f - b_f) - (t_u - b_u)        and not because f is easier for the base too

A frame brings the ability back when both paired intervals lie above 0, at a level shared out over all frames, and it
keeps at least MUCH more of the base than the usual formats do.
Sources: Kotha et al. 2024 (arXiv 2309.10105) for conjugate prompts, Wang et al. 2024 (ProMoT, arXiv 2211.00635) for
the loss that is one of format. The paper moves whole prompts to another language and back; here the task's words stay,
so no translation is needed and the answers are the same. Difference in differences and thresholds are ours.
Cost: one forward over the prompts for each model, demonstrations shared by all items of one task and frame.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from holdfast.data.fewshot import FORMATS, Format, Pair, Prompt, build, can_chat, formats_for
from holdfast.data.rendered import Rendered
from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.measure import stats
from holdfast.measure.asking import score_suite
from holdfast.measure.probe import Group, Probe, Suite
from holdfast.measure.suites.in_context import pick_shots, shuffled
from holdfast.measure.tasks import Task, held_out_tasks

TASKS = ("first_letter", "last_of_three", "nationality", "past_tense", "plural")  # short, open answers: no guessing
SHOTS, ITEMS, POOL = 4, 7, 8  # demonstrations, questions of a task, and what demonstrations are drawn from
MARGIN = 0.1  # ours: losing less than a tenth of the base is no loss to explain
MUCH = 0.25  # ours: a frame must keep this much more of the base than the usual formats
MOST = 0.5  # ours: below half of the base an ability is not called back, nor above it gone

CONJUGATE: dict[str, Format] = {
    f.name: f
    for f in (
        Format("german", "Frage: {x}\nAntwort:"),
        Format("spanish", "Pregunta: {x}\nRespuesta:"),
        Format("capitals", "INPUT: {x}\nOUTPUT:"),
        Format("json", '{{"input": "{x}", "output":', answer=' "{y}"}}', sep="\n"),
        Format("turn", ""),  # "io" after a neutral request, inside an answer of the tokenizer's chat template
    )
}
WORDS = {
    "german": "between German words (Frage, Antwort)",
    "spanish": "between Spanish words (Pregunta, Respuesta)",
    "capitals": "with the field names in capitals",
    "json": "as lines of JSON",
    "turn": "inside an answer of a chat",
}
ASKED = "Give more examples of the same kind."
ByFrame = Mapping[str, Sequence[float]]  # frame -> scores of the same items (N,) in one order


@dataclass(frozen=True)
class Judgement:
    """What the scores say.

    status: 'not measurable', 'kept', 'unclear', 'hidden', 'partly hidden', 'gone' or 'weaker'.
    usual: share of the base left in the usual formats. frame, back: the frame that keeps most and its share of the
    base; extra: the paired interval of what it keeps beyond the usual formats (for 'hidden' and 'partly hidden').
    """

    status: str
    usual: float = math.nan
    frame: str = ""
    back: float = math.nan
    extra: stats.Estimate | None = None


# ---- asking


def frames_for(tokenizer: Any) -> dict[str, Format]:
    """The usual formats, then the conjugate frames; those of a chat only with a chat template."""
    chat = can_chat(tokenizer, shots=0)
    return {f.name: f for f in (*formats_for(tokenizer), *CONJUGATE.values()) if chat or f.name != "turn"}


def build_suite(tasks: Sequence[Task], frames: Mapping[str, Format], tokenizer: Any, seed: int = 0) -> Suite:
    """One group a frame; its items come in the same order with the same demonstrations in every frame."""
    probes = []
    for task in tasks:
        order: list[Pair] = shuffled(f"{task.name}/{seed}", task.items)
        shots = pick_shots(order[:POOL], task.labels, SHOTS, f"{task.name}/formats/{seed}")
        for name, form in frames.items():
            for n, query in enumerate(order[POOL : POOL + ITEMS]):
                p = _prompt(form, shots, query, task, tokenizer)
                probes.append(Probe(name, f"{name}/{task.name}/{n}", "exact", p.context, (p.answer + p.stop,)))
    groups = tuple(Group(name, 1, 0.0, "exact") for name in frames)
    return Suite("formats", groups, tuple(probes), {"num_fewshot": SHOTS, "limit": ITEMS, "seed": seed})


def _prompt(form: Format, shots: Sequence[Pair], query: Pair, task: Task, tokenizer: Any) -> Prompt:
    if form.name != "turn":
        return build(form, shots, query, instruction=task.instruction, names=task.names, tokenizer=tokenizer)
    lead = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASKED}], tokenize=False, add_generation_prompt=True
    )
    inside = build(FORMATS["io"], shots, query, tokenizer=tokenizer)
    return Prompt(Rendered(lead + inside.context), inside.answer, inside.stop)


def scores_of(model: Any, tokenizer: Any, suite: Suite) -> dict[str, list[float]]:
    """Frame -> scores of its items, 1 for an exact greedy answer."""
    tasks = score_suite(model, tokenizer, suite)["tasks"]
    return {t["name"]: [float(i["correct"]) for i in t["items"]] for t in tasks}


# ---- judging


def loss_status(base: ArrayLike, tuned: ArrayLike) -> str:
    """'kept', 'lost' or 'unclear' for paired scores (N,), with MARGIN of the base's mean to spare."""
    b, t = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if (b == t).all():  # the same answers to all items: nothing to explain, however few they are
        return "kept"
    return stats.noninferiority(b, t, MARGIN * float(b.mean())).status


def judge(base: ByFrame, tuned: ByFrame, usual: Collection[str]) -> Judgement:
    """Name the cause from scores alone; `usual` are the frames people use."""
    able = [f for f in base if stats.measurable(base[f])]
    common = [f for f in able if f in usual]
    if not common:
        return Judgement("not measurable")
    b, t = _mean(base, common), _mean(tuned, common)
    left, status = float(t.mean() / b.mean()), loss_status(b, t)
    if status != "lost":
        return Judgement(status, left)
    level = 1 - 0.05 / len(able)  # the best of many frames is picked, so each has its part of the error
    compared = {f: _compare(base, tuned, f, [u for u in common if u != f], level) for f in able}
    found = {f: c for f, c in compared.items() if c[1]}
    best = max(found or compared, key=lambda f: compared[f][0])
    back, extra = compared[best]
    if found:
        return Judgement("hidden" if back >= MOST else "partly hidden", left, best, back, extra)
    return Judgement("gone" if back < MOST else "weaker", left, best, back)


def _mean(scores: ByFrame, frames: Sequence[str]) -> np.ndarray:
    """(N,) the mean of each item over some frames."""
    return np.mean([scores[f] for f in frames], axis=0)


def _compare(
    base: ByFrame,
    tuned: ByFrame,
    frame: str,
    others: Sequence[str],
    level: float,
) -> tuple[float, stats.Estimate | None]:
    """Share of the base a frame reaches, and the interval of `extra` if it brings the ability back (else None).

    The share is of the base's better score, in this frame or in the usual formats: a frame in which the base can do
    little brings little back, however much of that is kept.
    """
    b, t = np.asarray(base[frame], dtype=float), np.asarray(tuned[frame], dtype=float)
    if not others:
        return float(t.mean() / b.mean()), None
    bu, tu = _mean(base, others), _mean(tuned, others)
    back = float(t.mean() / max(b.mean(), bu.mean()))
    gain, extra = stats.paired(tu, t, level=level), stats.paired(tu - bu, t - b, level=level)
    much = back - float(tu.mean() / bu.mean()) >= MUCH
    return back, extra if much and gain.low > 0 and extra.low > 0 else None


# ---- telling


def diagnose(case: Case) -> Finding:
    """Ask both models the same items in all frames; under 6000 tokens each."""
    return compare_frames(case, held_out_tasks(TASKS))


def compare_frames(case: Case, tasks: Sequence[Task]) -> Finding:
    """As `diagnose`, on tasks of one's own: open answers, each with at least POOL + ITEMS items."""
    suite = build_suite(tasks, frames_for(case.tokenizer), case.tokenizer, case.seed)
    base, tuned = (scores_of(m, case.tokenizer, suite) for m in (case.base, case.tuned))
    verdict = judge(base, tuned, FORMATS)
    return Finding(
        name="format or ability",
        finding=_sentence(verdict, len(base)),
        detail=_detail(verdict, len(tasks), len(next(iter(base.values())))),
        table=_table(base, tuned),
        scores=_numbers(verdict, base, tuned),
    )


def _sentence(v: Judgement, num_frames: int) -> str:
    usual, back, how = f"{100 * v.usual:.0f} %", f"{100 * v.back:.0f} %", how_asked(v.frame)
    return {
        "not measurable": "Cannot tell: the base does too little of these tasks in any usual format to lose it.",
        "kept": f"{NOTHING}: on these items the usual formats keep {usual} of the base, so nothing needs explaining.",
        "unclear": f"Cannot tell: the usual formats keep {usual} of the base, on too few items to call it a loss.",
        "hidden": f"Hidden, not gone: {how}, the tuned model reaches {back} of the base (usual formats: {usual}).",
        "partly hidden": f"Partly hidden: {how}, {back} of the base comes back, against {usual} in the usual formats.",
        "gone": f"Gone, as far as {num_frames} formats show: none brings it back; the best, {how}, reaches {back}.",
        "weaker": f"Weaker, not hidden: the usual formats keep {usual} and none stands out (best: {how}, {back}).",
    }[v.status]


def how_asked(frame: str) -> str:
    """A frame in words that end a sentence."""
    return f"asked {WORDS[frame]}" if frame in WORDS else f"asked in the format {frame!r}"


def _detail(v: Judgement, num_tasks: int, num_items: int) -> str:
    text = (
        f"{num_items} questions of {num_tasks} held-out tasks, {SHOTS} examples each, the same in every format. "
        "'left' is the tuned model's score over the base's in that format, where the base's is measurable."
    )
    if v.extra:
        text += (
            f" Beyond what the other usual formats keep: {v.extra.value:+.2f} "
            f"({v.extra.low:+.2f} to {v.extra.high:+.2f}, corrected for the number of formats). "
            "The best of several formats looks a little better than it is."
        )
    if v.status in ("gone", "weaker"):
        text += " A way of asking that is not among these may still bring it back: see the revival test."
    return text


def _table(base: ByFrame, tuned: ByFrame) -> list[list[Any]]:
    rows: list[list[Any]] = [["format", "kind", "base", "tuned", "left"]]
    for f in base:
        left = _left(base[f], tuned[f])
        means = [f"{np.mean(s[f]):.2f}" for s in (base, tuned)]
        words = "not measurable" if math.isnan(left) else f"{100 * left:.0f} %"
        rows.append([f, "usual" if f in FORMATS else "conjugate", *means, words])
    return rows


def _left(base: Sequence[float], tuned: Sequence[float]) -> float:
    """Share of the base left in one frame, nan where the base is not measurable."""
    return sum(tuned) / sum(base) if stats.measurable(base) else math.nan


def _numbers(v: Judgement, base: ByFrame, tuned: ByFrame) -> dict[str, float]:
    """What can be measured of: share left in the usual formats, share the best frame reaches, share left in each."""
    every = {"usual": v.usual, "best": v.back} | {f"left/{f}": _left(base[f], tuned[f]) for f in base}
    return {k: x for k, x in every.items() if math.isfinite(x)}
