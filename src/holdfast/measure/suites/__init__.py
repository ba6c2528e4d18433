"""Suites by name: what can be measured, and the cache of what was measured before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from holdfast.errors import HoldfastError, suggest

DEFAULT_LIMIT = 48
SUITES = ("in-context", "anchors")


def measure_suite(
    suite: str,
    model: Any,
    tokenizer: Any,
    *,
    num_fewshot: int = 8,
    limit: int | None = None,
    batch_tokens: int = 512,
    cache_key: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Measure one suite; with `cache_key` (the model's content) an earlier result is reused.

    Raises:
        HoldfastError: the suite is unknown, or its prompts do not fit the model.
    """
    from holdfast.measure.incontext import measure
    from holdfast.models import cache_dir
    from holdfast.run import content_key, versions, write_json

    tasks = suite_tasks(suite)
    limit = limit or DEFAULT_LIMIT
    path = None
    if cache_key:
        facts = (cache_key, suite, num_fewshot, limit, str(model.dtype), str(model.device.type))
        key = content_key(*facts, [(t.name, t.version, len(t.items)) for t in tasks], versions())
        path = cache_dir() / "measurements" / f"{key}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    out = measure(
        model,
        tokenizer,
        tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    out["suite"] = suite
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, out)
    return out


def suite_tasks(suite: str) -> Any:
    """The tasks of a suite."""
    from holdfast.measure.tasks import anchor_tasks, held_out_tasks

    if suite == "in-context":
        return held_out_tasks()
    if suite == "anchors":
        return anchor_tasks()
    raise HoldfastError(f"There is no suite {suite!r}.", suggest(suite, SUITES))


def prompt_of(suite: str, task: str, item: str, tokenizer: Any, measured: dict[str, Any]) -> Any:
    """The prompt of one measured item, for showing it."""
    from holdfast.measure.incontext import items_of
    from holdfast.measure.tasks import tasks

    found = items_of(
        tasks()[task],
        tokenizer=tokenizer,
        num_fewshot=measured["num_fewshot"],
        limit=measured["limit"],
        seed=measured["seed"],
    )
    return next(i.prompt for i in found if i.id == item)
