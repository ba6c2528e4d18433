"""Suites by name: what can be measured, and the cache of what was measured before.

One file a suite, each with `build_suite(ask) -> Suite`; the data lies in `data/` and `incontext/` beside them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast.engine import BATCH_TOKENS
from holdfast.errors import HoldfastError
from holdfast.files import cache_dir, content_key, write_json
from holdfast.measure.asking import score_suite
from holdfast.measure.names import DEFAULT, SUITES, about, names_of
from holdfast.measure.probe import Ask, Probe, Suite
from holdfast.versions import code_of, versions

OURS = ("measure", "engine", "data")  # folders of the package that decide what a measurement finds

__all__ = (
    "DEFAULT",
    "SUITES",
    "about",
    "build",
    "check_suite",
    "code_of_ours",
    "measure_suite",
    "names_of",
    "probes_of",
    "remembered",
)


def build(name: str, ask: Ask) -> Suite:
    """The probes of one suite."""
    if name.startswith("jsonl:"):
        from holdfast.measure.jsonl import read_suite

        return read_suite(name.removeprefix("jsonl:"), ask)
    names_of([name])
    module, function = SUITES[name].split(":")
    return getattr(importlib.import_module(f"holdfast.measure.suites.{module}"), function)(ask)


def measure_suite(
    name: str,
    model: Callable[[], Any],
    tokenizer: Any,
    *,
    num_fewshot: int = 8,
    limit: int | None = None,
    seed: int = 0,
    labels: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    invariant: bool = False,
    cache_key: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Measure one suite; with `cache_key` (content, dtype and device of the model) an earlier result is reused.

    `model()` gives the model, and is only called if there is something to measure. invariant: no item depends on
    `batch_tokens` or on other items, to the last bit.

    Raises:
        HoldfastError: the suite is unknown, or its prompts do not fit the model.
    """
    how: dict[str, Any] = {"batch_tokens": batch_tokens, "invariant": invariant, "progress": progress}
    # a base measured in other batches would round otherwise than the tuned model it is compared with
    batches = "invariant" if invariant else batch_tokens
    if name.startswith("lm_eval:"):
        from holdfast.measure.lm_eval import measure_task

        def bridge() -> dict[str, Any]:
            return measure_task(model(), tokenizer, name, limit=limit, **how)

        own_file = ".yaml" in name or ".yml" in name  # it and its data may change between two calls
        return remembered(cache_key and not own_file and content_key(cache_key, name, limit, batches), bridge)
    suite = build(name, Ask(tokenizer, num_fewshot, limit, seed, tuple(labels)))

    def make() -> dict[str, Any]:
        return score_suite(model(), tokenizer, suite, **how)

    return remembered(cache_key and content_key(cache_key, name, suite.settings, asked_of(suite), batches), make)


def asked_of(suite: Suite) -> list[list[Any]]:
    """What a suite asks, probe by probe, as plain data that names a measurement of it."""
    return [[p.id, p.kind, p.context, p.answers, p.right, p.max_tokens, p.open_ended] for p in suite.probes]


def code_of_ours() -> str:
    """The code and data that measure."""
    return code_of(*OURS)


def remembered(key: str | bool | None, make: Callable[[], Any]) -> Any:
    """What `make` gives (plain data), kept in the cache folder under `key`; no key, nothing is kept.

    What another version of a library, of our own code or another number of threads measured is not used.
    """
    if not key:
        return make()
    import torch

    from holdfast.engine import processes

    name = content_key(key, versions(), torch.get_num_threads(), code_of_ours())
    path = cache_dir() / "measurements" / f"{name}.json"
    found = processes.told(
        lambda: _read(path)
    )  # if only some processes found it, the others would wait for them forever
    if found is not None:
        return found
    out = make()
    if processes.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, out)
    return out


def _read(path: Path) -> Any:
    """Plain data, or None where the file is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_suite(name: str, ask: Ask, longest: int) -> None:
    """Refuse a suite whose prompts a model of `longest` positions cannot read, before any forward.

    Raises:
        HoldfastError: the suite is unknown, too small for the shots, or too long for the model.
    """
    if name.startswith("lm_eval:"):
        return
    probes = build(name, ask).probes
    if not probes:  # nothing to ask of this model, and its note says why
        return
    texts = [p.context + max(p.answers, key=len, default="") for p in probes]
    spoken = [p.max_tokens if p.kind == "generate" else 0 for p in probes]
    lengths = [len(ids) for ids in ask.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    most = max(n + m for n, m in zip(lengths, spoken, strict=True))
    if most >= longest:
        raise HoldfastError(
            f"The suite {name!r} at {ask.num_fewshot} shots needs {most} tokens, the model reads {longest}.",
            "Lower measure.num_fewshot, or use a model that reads more.",
        )


def probes_of(measured: dict[str, Any], tokenizer: Any) -> dict[str, Probe]:
    """The probes of a measurement by id, for showing them; none for another tool's tasks."""
    if measured["suite"].startswith("lm_eval:"):
        return {}
    settings = {k: measured[k] for k in ("num_fewshot", "limit", "seed") if k in measured}
    suite = build(measured["suite"], Ask(tokenizer, **settings, labels=tuple(measured.get("labels", ()))))
    return {p.id: p for p in suite.probes}
