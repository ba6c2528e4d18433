"""Diagnoses: why a tuned model lost something. Each is one file with `diagnose(case) -> Finding`.

A diagnosis names a place (a layer, a matrix, a format) or says that nothing is unusual. Its rules are stated in its
file; a finding is a lead to follow, not a proof of cause.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import HoldfastError, suggest
from holdfast.report.schema import DiagnosisPart

DIAGNOSES: dict[str, str] = {  # run order, cheap to dear; these are made where none is named
    "layer drift": "layer_drift:diagnose",
    "intruder dimensions": "intruder:diagnose",
    "tuco": "tuco:diagnose",
    "parameter sensitivity": "sensitivity:diagnose",
    "format or ability": "formats:diagnose",
    "revival": "revival:diagnose",
}
MORE: dict[str, str] = {  # only by name
    "class separability": "classes:diagnose",
    "safety subspaces": "subspaces:diagnose",
    "entities": "entities:diagnose",
    "mode connectivity": "connectivity:diagnose",
    "novelty": "novelty:diagnose",
    "faithfulness": "faithfulness:diagnose",
}
NOTHING = "Nothing unusual"  # how the sentence of an inconspicuous finding begins


@dataclass(frozen=True)
class Case:
    """What a diagnosis looks at.

    Attributes:
        base: the model before tuning, a Hugging Face causal LM.
        tuned: the model after tuning, adapters merged; same architecture.
        tokenizer: of both.
        before: measurements of `base` as `measure.asking.score_suite` returns them; may be empty.
        after: the same of `tuned`.
        seed: draws prompts and controls.
        ancestor: the model that `base` itself was tuned from, for diagnoses that ask about three; may be None.
    """

    base: Any
    tuned: Any
    tokenizer: Any
    before: Sequence[dict[str, Any]] = ()
    after: Sequence[dict[str, Any]] = ()
    seed: int = 0
    ancestor: Any = None


@dataclass(frozen=True)
class Finding:
    """What a diagnosis found.

    Attributes:
        name: of the diagnosis, as in `DIAGNOSES`.
        finding: one plain sentence that names the place, or says that nothing is unusual.
        detail: how it was measured and what else was seen.
        table: first row column names, or None.
        scores: the numbers behind the sentence.
    """

    name: str
    finding: str
    detail: str = ""
    table: list[list[Any]] | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def part(self) -> DiagnosisPart:
        """The finding as the report holds it."""
        return {"name": self.name, "finding": self.finding, "detail": self.detail, "table": self.table}


def run(
    case: Case,
    names: Sequence[str] | None = None,
    tell: Callable[[str, float, str], None] = lambda *_: None,
) -> list[Finding]:
    """Run the diagnoses (`names`, or those of `DIAGNOSES`), those of `MORE` last; one that cannot be made says why.

    `tell(phase, share done, name)` hears of the progress.

    Raises:
        HoldfastError: a name is unknown.
    """
    check_names(names or ())
    wanted = [*DIAGNOSES] if names is None else [n for n in (*DIAGNOSES, *MORE) if n in names]
    findings = []
    for n, name in enumerate(wanted):
        tell("diagnose", n / len(wanted), name)
        try:
            findings.append(_function(name)(case))
        except HoldfastError as error:  # the other diagnoses are still worth having
            findings.append(Finding(name, f"Not made: {error.what}", error.cure))
    tell("diagnose", 1.0, "")
    return findings


def check_names(names: Sequence[str]) -> None:
    """Raise HoldfastError for a name that no diagnosis has."""
    for name in names:
        if name not in {**DIAGNOSES, **MORE}:
            raise HoldfastError(f"There is no diagnosis {name!r}.", suggest(name, (*DIAGNOSES, *MORE)))


def _function(name: str) -> Callable[[Case], Finding]:
    module, function = {**DIAGNOSES, **MORE}[name].split(":")
    return getattr(importlib.import_module(f"holdfast.diagnose.{module}"), function)
