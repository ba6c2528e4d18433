"""measure: what one model can do, suite by suite, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.files import write_json
from holdfast.report import terminal
from holdfast.report.progress import progress_on
from holdfast.report.writing import may_write
from holdfast.runs.run import Tell, silent
from holdfast.runs.several import join


def measure(
    name: str,
    *,
    revision: str | None = None,
    suites: Sequence[str] = ("default",),
    trust_remote_code: bool = False,
    tell: Tell = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model's suites; `settings` go to `Subject.measure`.

    Returns {"model": {...}, "suites": [measurements]}.
    """
    from holdfast.measure.suites import names_of
    from holdfast.runs.subject import Subject

    names = names_of(suites)  # a wrong name is found before the model is loaded
    subject = Subject(name, revision, trust_remote_code)
    measured = subject.measure(names, tell=tell, **settings)
    return {"model": subject.part(), "suites": measured}


def command(name: str, *, out: Path | None, **settings: Any) -> None:
    """`holdfast measure`: a table of each suite, and every item in `out`; `settings` go to `measure`."""
    writes = join()
    if out:
        may_write(out, ())
    console = Console()
    with progress_on(console) as progress:
        got = measure(name, tell=progress.tell, **settings)
    terminal.show_measured(got["suites"], console)
    if out and writes:
        write_json(out, got)
