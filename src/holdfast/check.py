"""measure and check: abilities of one model, and a gate between a base and a tuned model from any tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import holdfast
from holdfast.errors import HoldfastError, ModelError

EXIT = {"kept": 0, "lost": 1, "unclear": 3, "not checked": 3}
Tell = Callable[[str, float, str], None]


def measure(
    name: str,
    *,
    revision: str | None = None,
    suites: Sequence[str] = ("in-context",),
    num_fewshot: int = 8,
    limit: int | None = None,
    batch_tokens: int = 512,
    trust_remote_code: bool = False,
    phase: str = "measure",
    tell: Tell = lambda *_: None,
) -> dict[str, Any]:
    """Measure a model's suites. Results are cached by the model's content.

    Returns {"model": {...}, "vocabulary": identity of the tokenizer, "suites": [measurements]}.
    """
    from holdfast import models
    from holdfast.measure.suites import measure_suite, names_of

    suites = names_of(suites)  # a wrong name is found before the model is loaded
    tell(phase, 0.0, name)
    source = models.resolve(name, revision)
    model, tokenizer = models.load(source, trust_remote_code=trust_remote_code, merge_adapter=True)
    sha = models.fingerprint(source)
    measured = [
        measure_suite(
            suite,
            model,
            tokenizer,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_tokens=batch_tokens,
            cache_key=sha,
            progress=lambda x, n=n: tell(phase, (n + x) / len(suites), name),
        )
        for n, suite in enumerate(suites)
    ]
    tell(phase, 1.0, name)
    return {
        "model": {"name": source.name, "revision": source.revision, "sha": sha, "dtype": str(model.dtype)[6:]},
        "kind": model.config.model_type,
        "vocabulary": _vocabulary(tokenizer),
        "suites": measured,
    }


def _vocabulary(tokenizer: Any) -> str:
    """Identity of what text becomes: vocabulary and a few encoded strings."""
    from holdfast.run import content_key

    probes = ["Q: 12 apples\n\nA: pears", "  def f(x):\n\treturn x", "\u00dcber \u4f60\u597d"]
    return content_key(sorted(tokenizer.get_vocab().items()), [tokenizer.encode(p) for p in probes])


def check(
    base: str,
    tuned: str,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    keep: Mapping[str, float] | None = None,
    suites: Sequence[str] = ("in-context",),
    tell: Tell = lambda *_: None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare two models on the same items; returns a report (`report.schema`) whose verdict says kept or lost.

    keep: share of each ability that must be left, 0.95 by default. `settings` go to `measure`.

    Raises:
        ModelError: the two models do not read text the same way, so their scores cannot be paired.
    """
    from holdfast.compare import abilities, verdict
    from holdfast.recipe import KEEP_FRAC
    from holdfast.run import versions

    keep = dict(keep or {})
    unknown = [k for k in keep if k not in suites]
    if unknown:
        raise HoldfastError(
            f"--keep names {unknown[0]!r}, but only {', '.join(suites)} is measured.", "Add it with --suite."
        )
    before = measure(base, revision=base_revision, suites=suites, phase="measure before", tell=tell, **settings)
    after = measure(tuned, revision=tuned_revision, suites=suites, phase="measure after", tell=tell, **settings)
    if before["kind"] != after["kind"]:
        raise ModelError(
            f"{base} is a {before['kind']} model and {tuned} is a {after['kind']} model.",
            "Check a tuned model against the base it was tuned from.",
        )
    if before["vocabulary"] != after["vocabulary"]:
        raise ModelError(
            f"{base} and {tuned} have different tokenizers, so the same text is not the same task for them.",
            "Check a tuned model against the base it was tuned from, with its tokenizer unchanged.",
        )
    judged = abilities(before["suites"], after["suites"], keep, KEEP_FRAC)
    return {
        "holdfast_version": holdfast.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": "check",
        "verdict": verdict(judged, None),
        "model": before["model"],
        "tuned": {"name": after["model"]["name"], "path": tuned, "sha": after["model"]["sha"]},
        "task": None,
        "abilities": judged,
        "versions": versions(),
        "settings": {k: before["suites"][0][k] for k in ("num_fewshot", "limit", "seed")},
    }


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as its file name asks: .json, .html, .md or .xml (JUnit)."""
    from holdfast.report import markdown, page
    from holdfast.run import write_text

    kinds: dict[str, Callable[[Any], str]] = {
        ".json": lambda r: json.dumps(r, indent=1, allow_nan=False),
        ".html": page.render,
        ".md": markdown.summary,
        ".xml": markdown.junit,
    }
    if path.suffix not in kinds:
        raise HoldfastError(f"{path} has no known ending.", f"Use one of: {', '.join(kinds)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, kinds[path.suffix](dict(report)))
