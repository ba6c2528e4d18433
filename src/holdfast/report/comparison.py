"""The report of two models that were measured on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
) -> dict[str, Any]:
    """A report (`report.schema`) whose verdict says kept or lost.

    judged: abilities as `compare.abilities` gives them; after: the tuned model's measurements; shown: its examples.
    """
    used = versions()
    return {
        "holdfast_version": used["holdfast"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": "check",
        "verdict": verdict(judged, None),
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
