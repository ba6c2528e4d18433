"""check: a gate between a base and a tuned model from any tool. Does the tuned model keep what the base can do?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from holdfast.errors import HoldfastError, ModelError
from holdfast.recipe import KEEP_FRAC
from holdfast.report import terminal
from holdfast.report.examples import examples
from holdfast.report.progress import progress_on
from holdfast.report.writing import may_write, write
from holdfast.runs.run import Tell, silent
from holdfast.runs.several import join

if TYPE_CHECKING:
    from holdfast.runs.subject import Subject

__all__ = ("EXIT", "check", "command", "may_write", "write")
EXIT = {"kept": 0, "lost": 1, "unclear": 3, "not checked": 3}

THREE = "safety subspaces"  # the diagnosis that asks about three models


def check(
    base: str,
    tuned: str,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    keep: Mapping[str, float] | None = None,
    suites: Sequence[str] = ("default",),
    why: bool = False,
    causes: Sequence[str] = (),
    ancestor: str | None = None,
    trust_remote_code: bool = False,
    tell: Tell = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Compare two models on the same items; returns a report (`report.schema`) whose verdict says kept or lost.

    keep: share of each ability that must be left, 0.95 by default. why: look for the place of a loss too (both models
    are in memory then). causes: names of further diagnoses (`diagnose.MORE`), or of some where `why` is not set.
    ancestor: the model that `base` was tuned from, for diagnoses that ask about three. `settings` go to
    `Subject.measure`.

    Raises:
        ModelError: the two models do not read text the same way, so their scores cannot be paired.
    """
    from holdfast.measure.compare import abilities
    from holdfast.measure.suites import names_of
    from holdfast.report.comparison import comparison
    from holdfast.runs.subject import Subject

    names, keep, wanted = names_of(suites), dict(keep or {}), _wanted(why, causes, ancestor)
    _check_floors(keep, names)
    first = Subject(base, base_revision, trust_remote_code)
    second = Subject(tuned, tuned_revision, trust_remote_code)
    third = Subject(ancestor, None, trust_remote_code) if ancestor else None
    _check_pair(base, first, tuned, second)
    _check_below(base, first, tuned, second)
    note = _one_template(first, second)
    if ancestor and third:
        _check_pair(ancestor, third, base, first)
    before = first.measure(names, phase="measure before", tell=tell, **settings)
    if not wanted:
        first.forget()  # one model in memory at a time
    after = second.measure(names, phase="measure after", tell=tell, **settings)
    return comparison(
        first.part(),
        {"name": second.source.name, "path": tuned, "sha": second.sha},
        abilities(before, after, keep, KEEP_FRAC),
        after,
        second.tokenizer,
        shown=examples(lambda: second.model, second.tokenizer, before, after),
        diagnosis=_diagnosis(first, second, third, before, after, wanted, tell) if wanted else None,
        floors=keep,
        note=note,
    )


def _check_floors(keep: Mapping[str, float], names: Sequence[str]) -> None:
    unknown = [k for k in keep if k not in names]
    if unknown:
        raise HoldfastError(
            f"--keep names {unknown[0]!r}, but only {', '.join(names)} is measured.", "Add it with --suite."
        )


def _check_pair(base: str, first: Subject, tuned: str, second: Subject) -> None:
    cure = "Check a tuned model against the base it was tuned from"
    if first.kind != second.kind:
        raise ModelError(f"{base} is a {first.kind} model and {tuned} is a {second.kind} model.", f"{cure}.")
    if first.vocabulary != second.vocabulary:
        raise ModelError(
            f"{base} and {tuned} have different tokenizers, so the same text is not the same task for them.",
            f"{cure}, with its tokenizer unchanged.",
        )


def _check_below(base: str, first: Subject, tuned: str, second: Subject) -> None:
    """Raise ModelError for an adapter that lies on another model than `base`: both would be compared, not the tuning.

    A base that is packed on either side cannot be compared; it is taken at its word.
    """
    from holdfast import models
    from holdfast.models import loadable
    from holdfast.sites.merge_files import Pair

    below = second.source
    while below.base is not None:
        below = below.base
    if second.source.kind != "adapter" or first.source.kind == "adapter" or models.fingerprint(below) == first.sha:
        return
    if loadable.quantisation(below) is not None or loadable.quantisation(first.source) is not None:
        return
    try:
        Pair(first.source, second.source)
    except ModelError as e:
        what = f"{tuned} is an adapter on {below.label}, and not on {base}: {e.what}"
        raise ModelError(what, "Name the base that the adapter was trained on.") from e


def _one_template(first: Subject, second: Subject) -> str:
    """Let both be asked in the base's chat template, and say so where the tuned model has another one."""
    one, other = (getattr(s.tokenizer, "chat_template", None) for s in (first, second))
    if one == other:
        return ""
    second.tokenizer = first.tokenizer  # the vocabularies are equal
    whose = "the base's chat template" if one else "plain text, as the base has no chat template"
    return f"Both were asked in {whose}; the tuned model's own differs."


def _wanted(why: bool, causes: Sequence[str], ancestor: str | None) -> list[str]:
    """The names of the diagnoses to make."""
    from holdfast.diagnose import DIAGNOSES, check_names

    check_names(causes)
    if ancestor and THREE not in causes:
        what = f"An ancestor ({ancestor}) is named, but no diagnosis that asks about three models."
        raise HoldfastError(what, f"Add --cause '{THREE}'.")
    return [*dict.fromkeys((*(DIAGNOSES if why else ()), *causes))]


def _diagnosis(
    first: Subject, second: Subject, third: Subject | None, before: Any, after: Any, names: Sequence[str], tell: Tell
) -> list[Any]:
    from holdfast.diagnose import Case, run

    ancestor = third.model if third else None
    case = Case(first.model, second.model, second.tokenizer, before, after, ancestor=ancestor)
    return [f.part() for f in run(case, names, tell=tell)]


def command(base: str, tuned: str, *, keep: Sequence[str], out: Sequence[Path], **settings: Any) -> int:
    """`holdfast check`: the verdict on the terminal, in the files `out` and as exit code; `settings` go to `check`."""
    writes = join()
    floors = floors_of(keep)
    for path in out:
        may_write(path)
    console = Console()
    with progress_on(console) as progress:
        report = check(base, tuned, keep=floors, tell=progress.tell, **settings)
    terminal.show(report, console)  # before the files: a full disk hides no verdict
    for finding in report["diagnosis"] or ():
        console.print(f"{finding['name']}: {finding['finding']}", markup=False, highlight=False)
    for path in out if writes else ():
        write(report, path)
    return EXIT[report["verdict"]["status"]]


def floors_of(items: Sequence[str]) -> dict[str, float]:
    """The shares to keep of a command line, each "ability=share"."""
    pairs = [_floor_of(item) for item in items]
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise HoldfastError(f"--keep names {twice} twice, and nothing says which share counts.", "Give it once.")
    return dict(pairs)


def _floor_of(item: str) -> tuple[str, float]:
    """An ability and the share of it to keep, from "ability=share"."""
    name, _, value = item.partition("=")
    try:
        share = float(value)
    except ValueError:
        raise HoldfastError(f"--keep {item!r} is not of the form ability=share.", "Write in-context=0.97.") from None
    if not 0 < share < 1:
        raise HoldfastError(f"--keep {item!r}: a share to keep lies between 0 and 1.", "Write in-context=0.97.")
    return name, share
