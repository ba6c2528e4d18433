"""The report of two models that were measured on the same items."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from holdfast.measure.compare import verdict
from holdfast.report.examples import prompts
from holdfast.versions import versions

SETTINGS = ("num_fewshot", "limit", "seed", "labels")  # of a measurement, as the report names them


def comparison(
    model: Mapping[str, Any],
    tuned: Mapping[str, Any],
    judged: Sequence[Any],
    after: Sequence[Any],
    tokenizer: Any,
    *,
    shown: Sequence[Any],
    diagnosis: Sequence[Any] | None = None,
    floors: Collection[str] = (),
    note: str = "",
) -> dict[str, Any]:
    """A report (`report.schema`) whose verdict says kept or lost; note: a further sentence of it.

    judged: abilities as `compare.abilities` gives them; after: the tuned model's measurements; shown: its examples;
    floors: the abilities that somebody asked to keep.
    """
    used, said = versions(), verdict(judged, None, floors)
    return {
        "holdfast_version": used["holdfast"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": "check",
        "verdict": {**said, "sentence": f"{said['sentence']} {note}".rstrip()},
        "model": model,
        "tuned": tuned,
        "task": None,
        "abilities": judged,
        "examples": shown,
        "diagnosis": diagnosis,
        "prompts": prompts(tokenizer, after),
        "versions": used,
        "settings": {m["suite"]: ", ".join(f"{k} {m[k]}" for k in SETTINGS if m.get(k)) for m in after},
    }
