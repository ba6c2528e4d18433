"""measure and check: abilities of one model, and a gate between a base and a tuned model from any tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.engine import BATCH_TOKENS
from holdfast.errors import HoldfastError, ModelError

EXIT = {"kept": 0, "lost": 1, "unclear": 3, "not checked": 3}
ENDINGS = (".json", ".html", ".md", ".xml")  # of reports
Tell = Callable[[str, float, str], None]


class Subject:
    """One model to be measured: its files, its tokenizer, and its weights once somebody needs them.

    Args:
        name: hub id, folder, adapter, GGUF file or alias.
        revision: of a hub id.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, name: str, revision: str | None = None, trust_remote_code: bool = False):
        from holdfast import models

        self.source = models.resolve(name, revision)
        self.trust = trust_remote_code
        self.tokenizer: Any = models.load_tokenizer(self.source, trust_remote_code)
        self.device, self.dtype = models.auto_place()

    @cached_property
    def model(self) -> Any:
        """The model, adapter merged."""
        from holdfast import models

        return models.load(self.source, trust_remote_code=self.trust, merge_adapter=True)[0]

    @cached_property
    def sha(self) -> str:
        """Identity of its content."""
        from holdfast import models
        from holdfast.engine import processes

        return processes.told(lambda: models.fingerprint(self.source))

    @cached_property
    def kind(self) -> str:
        """Its architecture, from the configuration alone."""
        from holdfast.models import read_config

        return read_config(self.source, self.trust).model_type

    @cached_property
    def vocabulary(self) -> str:
        """Identity of what text becomes: vocabulary and a few encoded strings."""
        from holdfast.data.tokens import Encoder
        from holdfast.files import content_key

        probes = ["Q: 12 apples\n\nA: pears", "  def f(x):\n\treturn x", "\u00dcber \u4f60\u597d"]
        return content_key(sorted(self.tokenizer.get_vocab().items()), Encoder(self.tokenizer).prompts(probes))

    def measure(
        self,
        suites: Sequence[str],
        *,
        num_fewshot: int = 8,
        limit: int | None = None,
        labels: Sequence[str] = (),
        batch_tokens: int = BATCH_TOKENS,
        phase: str = "measure",
        tell: Tell = lambda *_: None,
    ) -> list[dict[str, Any]]:
        """Measure `suites`; what was measured before on this content is read from the cache."""
        from holdfast.files import content_key
        from holdfast.measure.suites import measure_suite

        tell(phase, 0.0, self.source.name)
        key = content_key(self.sha, str(self.dtype), self.device.type)
        out = [
            measure_suite(
                suite,
                lambda: self.model,
                self.tokenizer,
                num_fewshot=num_fewshot,
                limit=limit,
                labels=labels,
                batch_tokens=batch_tokens,
                cache_key=key,
                progress=lambda x, n=n, suite=suite: tell(phase, (n + x) / len(suites), suite),
            )
            for n, suite in enumerate(suites)
        ]
        tell(phase, 1.0, self.source.name)
        return out


def measure(
    name: str,
    *,
    revision: str | None = None,
    suites: Sequence[str] = ("default",),
    trust_remote_code: bool = False,
    tell: Tell = lambda *_: None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model's suites; `settings` go to `Subject.measure`.

    Returns {"model": {...}, "suites": [measurements]}.
    """
    from holdfast.measure.suites import names_of

    names = names_of(suites)  # a wrong name is found before the model is loaded
    subject = Subject(name, revision, trust_remote_code)
    measured = subject.measure(names, tell=tell, **settings)
    return {"model": _model_part(subject), "suites": measured}


def _model_part(subject: Subject) -> dict[str, Any]:
    source = subject.source
    return {
        "name": source.name,
        "revision": source.revision,
        "sha": subject.sha,
        "dtype": str(subject.dtype).removeprefix("torch."),
    }


def check(
    base: str,
    tuned: str,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    keep: Mapping[str, float] | None = None,
    suites: Sequence[str] = ("default",),
    why: bool = False,
    trust_remote_code: bool = False,
    tell: Tell = lambda *_: None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare two models on the same items; returns a report (`report.schema`) whose verdict says kept or lost.

    keep: share of each ability that must be left, 0.95 by default. why: look for the place of a loss too (both models
    are in memory then). `settings` go to `Subject.measure`.

    Raises:
        ModelError: the two models do not read text the same way, so their scores cannot be paired.
    """
    from holdfast.measure.compare import abilities
    from holdfast.measure.suites import names_of
    from holdfast.recipe import KEEP_FRAC
    from holdfast.report.examples import examples

    names, keep = names_of(suites), dict(keep or {})
    unknown = [k for k in keep if k not in names]
    if unknown:
        raise HoldfastError(
            f"--keep names {unknown[0]!r}, but only {', '.join(names)} is measured.", "Add it with --suite."
        )
    first = Subject(base, base_revision, trust_remote_code)
    second = Subject(tuned, tuned_revision, trust_remote_code)
    _check_pair(base, first, tuned, second)
    before = first.measure(names, phase="measure before", tell=tell, **settings)
    if not why:
        first.__dict__.pop("model", None)  # one model in memory at a time
    after = second.measure(names, phase="measure after", tell=tell, **settings)
    return comparison(
        _model_part(first),
        {"name": second.source.name, "path": tuned, "sha": second.sha},
        abilities(before, after, keep, KEEP_FRAC),
        after,
        second.tokenizer,
        shown=examples(lambda: second.model, second.tokenizer, before, after),
        diagnosis=_diagnosis(first, second, before, after, tell) if why else None,
    )


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
    """The report (`report.schema`) of two models that were measured on the same items.

    judged: abilities as `compare.abilities` gives them; after: the tuned model's measurements; shown: its examples.
    """
    from holdfast.measure.compare import verdict
    from holdfast.report.examples import prompts
    from holdfast.versions import __version__, versions

    return {
        "holdfast_version": __version__,
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
        "versions": versions(),
        "settings": {
            m["suite"]: ", ".join(f"{k} {m[k]}" for k in ("num_fewshot", "limit", "seed", "labels") if m.get(k))
            for m in after
        },
    }


def _check_pair(base: str, first: Subject, tuned: str, second: Subject) -> None:
    cure = "Check a tuned model against the base it was tuned from"
    if first.kind != second.kind:
        raise ModelError(f"{base} is a {first.kind} model and {tuned} is a {second.kind} model.", f"{cure}.")
    if first.vocabulary != second.vocabulary:
        raise ModelError(
            f"{base} and {tuned} have different tokenizers, so the same text is not the same task for them.",
            f"{cure}, with its tokenizer unchanged.",
        )


def _diagnosis(first: Subject, second: Subject, before: Any, after: Any, tell: Tell) -> list[Any]:
    from holdfast.diagnose import Case, run

    case = Case(first.model, second.model, second.tokenizer, before, after)
    return [f.part() for f in run(case, tell=tell)]


def may_write(path: Path, endings: Sequence[str] = ENDINGS) -> None:
    """Make ready for a file at `path` before long work. Under several processes an older file there is removed.

    torchrun ends with exit code 1 whatever happened, so there the file alone says the verdict, and it must not be that
    of an earlier check.

    Raises:
        HoldfastError: the ending is none of `endings`, or a folder lies there.
    """
    from holdfast.engine import processes

    if endings and path.suffix not in endings:
        raise HoldfastError(f"{path} has no known ending.", f"Use one of: {', '.join(endings)}.")
    if path.is_dir():
        raise HoldfastError(f"{path} is a folder, so nothing can be written there.", "Name a file.")
    if processes.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        if processes.world()[1] > 1:
            path.unlink(missing_ok=True)


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as its file name asks: .json, .html, .md or .xml (JUnit)."""
    from holdfast.files import write_text
    from holdfast.report import markdown, page

    may_write(path)
    kinds: dict[str, Callable[[Any], str]] = {
        ".json": lambda r: json.dumps(r, indent=1, allow_nan=False),
        ".html": page.render,
        ".md": markdown.summary,
        ".xml": markdown.junit,
    }
    write_text(path, kinds[path.suffix](dict(report)))
