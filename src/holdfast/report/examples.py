"""The worst changed answers, side by side: what the base got right and the tuned model gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

CUT = " ..."


def examples(
    model: Callable[[], Any], tokenizer: Any, before: Sequence[Any], after: Sequence[Any], most: int = 6
) -> list[dict[str, str]]:
    """At most one item of each task, the greatest drop first; `model()` is the tuned one and is asked for its words.

    Args:
        before, after: measurements of the same suites (`measure.asking.score_suite`).
    """
    from holdfast.measure.generate import generate
    from holdfast.measure.suites import probes_of

    chosen = []
    for b, a in zip(before, after, strict=True):
        probes = probes_of(b, tokenizer)
        for tb, ta in zip(b["tasks"], a["tasks"], strict=True):
            drops = [(i["correct"] - j["correct"], i, j) for i, j in zip(tb["items"], ta["items"], strict=True)]
            drop, i, j = max(drops, key=lambda d: d[0])
            if drop > 0 and i["id"] in probes and probes[i["id"]].kind != "likelihood":
                chosen.append((drop, probes[i["id"]], i, j))
    chosen = sorted(chosen, key=lambda c: -c[0])[:most]
    unsaid = [replace(p, max_tokens=12) for _, p, _, j in chosen if "output" not in j]
    words = generate(model(), tokenizer, unsaid) if unsaid else []
    said = dict(zip([p.id for p in unsaid], words, strict=True))
    return [
        {
            "task": p.task,
            "prompt": p.context[-400:],
            "expected": p.answer.strip(),
            "before": i.get("output", p.answer.strip()),
            "after": j["output"] if "output" in j else said[p.id].split("\n")[0],
        }
        for _, p, i, j in chosen
    ]


def answers(
    rows: Sequence[Any],
    before: Sequence[Any] | None,
    after: Sequence[Any],
    plain: Callable[[str], str] = str,
    most: int = 6,
) -> list[Any]:
    """Answers to the task side by side: the greatest losses first, the greatest gains last; none without both sides.

    Args:
        rows: of the test set; before, after: their scored items (`measure.tuned_task`). plain: an answer as a reader
            knows it.
    """
    sides = zip(rows, before or (), after, strict=bool(before))
    both = [(b, a, r) for r, b, a in sides if b["answer"] is not None and a["answer"] is not None]
    order = sorted(both, key=lambda x: x[1]["correct"] - x[0]["correct"])
    shown = order if len(order) <= most else [*order[: most // 2], *order[-(most // 2) :]]
    return [
        {
            "task": r.where,
            "prompt": r.prompt[-400:],
            "expected": plain(r.completion).strip(),
            "before": _said(b, plain),
            "after": _said(a, plain),
        }
        for b, a, r in shown
    ]


def _said(item: Any, plain: Callable[[str], str]) -> str:
    """An answer, marked where it was cut before its end."""
    return plain(item["answer"]).strip() + (CUT if item.get("cut") else "")


def prompts(tokenizer: Any, measured: Sequence[Any]) -> list[dict[str, str]]:
    """One whole prompt of each suite, as the model saw it."""
    from holdfast.measure.suites import probes_of

    first = [(m["suite"], next(iter(probes_of(m, tokenizer).values()), None)) for m in measured]
    return [{"task": suite, "text": p.context + p.answer} for suite, p in first if p]
