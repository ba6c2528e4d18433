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
    from holdfast.run import content_key, versions

    tasks = suite_tasks(suite)
    limit = limit or DEFAULT_LIMIT

    def make() -> dict[str, Any]:
        out = measure(
            model,
            tokenizer,
            tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        return {**out, "suite": suite}

    if not cache_key:
        return make()
    facts = (cache_key, suite, num_fewshot, limit, str(model.dtype), str(model.device.type))
    return remembered(content_key(*facts, [(t.name, t.version, len(t.items)) for t in tasks], versions()), make)


def remembered(key: str | None, make: Callable[[], Any]) -> Any:
    """What `make` gives (plain data), kept in the cache folder under `key`; no key, nothing is kept."""
    if not key:
        return make()
    from holdfast.models import cache_dir
    from holdfast.run import write_json

    path = cache_dir() / "measurements" / f"{key}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged: made anew
        out = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, out)
    return out


def check_suite(suite: str, tokenizer: Any, *, num_fewshot: int, limit: int | None, longest: int) -> None:
    """Refuse a suite whose prompts a model of `longest` positions cannot read, before any forward.

    Raises:
        HoldfastError: the suite is unknown, too small for the shots, or too long for the model.
    """
    from holdfast.measure.incontext import items_of

    asked = [
        item
        for task in suite_tasks(suite)
        for item in items_of(task, tokenizer=tokenizer, num_fewshot=num_fewshot, limit=limit or DEFAULT_LIMIT)
    ]
    texts = [i.prompt.context + i.prompt.answer + i.prompt.stop for i in asked]
    most = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    if most >= longest:
        raise HoldfastError(
            f"The suite {suite!r} at {num_fewshot} shots needs {most} tokens, the model reads {longest}.",
            "Lower measure.num_fewshot, or use a model that reads more.",
        )


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
