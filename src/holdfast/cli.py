"""The command line.

Exit codes: 0 done (check: kept), 1 check: lost, 2 a mistake to mend, 3 check: not enough evidence, 70 a fault of ours;
`ending` says how errors get theirs.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.engine import BATCH_TOKENS
from holdfast.verbs import ending

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model without losing what it knows, and prove it.",
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key, such as training.seed=1.")]
_debug = False


class _Ended(Exception):
    """How a command ended, on its way past typer, which has exit codes of its own for some errors."""

    def __init__(self, command: str, code: int = 0, error: BaseException | None = None):
        super().__init__(command)
        self.command, self.code, self.error = command, code, error


def _command(run: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make `run` a command; it may return an exit code."""

    @functools.wraps(run)
    def ended(*args: Any, **options: Any) -> None:
        try:
            code = run(*args, **options) or 0
        except BaseException as e:  # SystemExit of a library and EOFError too: typer would make them exit code 1
            raise _Ended(run.__name__, error=e) from None
        raise _Ended(run.__name__, code)

    app.command()(ended)
    return run


def _start(debug: bool) -> None:
    """Without --debug only our own words reach the terminal: no bars and no warnings of the libraries below."""
    global _debug
    _debug = debug
    if debug:
        return
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"holdfast(\.|$)")
    warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)


def _join() -> bool:
    """Join the processes of torchrun, if any; whether this one prints and writes. Alone it need not load torch."""
    if "RANK" not in os.environ:
        return True
    from holdfast.engine import processes

    processes.start()
    return processes.first()


@_command
def tune(recipe: Path, set: Set = None, debug: Debug = False) -> None:
    """Measure, tune under a plan, measure again, report and export."""
    _start(debug)
    import json

    from rich.console import Console

    from holdfast.report import terminal
    from holdfast.report.progress import progress_on
    from holdfast.verbs.tune import Run, load_recipe

    loaded = load_recipe(recipe, set or [])
    writes = _join()
    console = Console()
    with progress_on(console) as progress:
        run = Run(loaded, recipe.absolute().parent, progress.tell)
        was_done = run.finished
        folder = run.go()
    if not writes:
        return
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if was_done:
        print(f"This run was finished before; nothing was done. Its folder: {folder}")
    terminal.show(report, console, folder / "report.html")
    print(f"Tuned model: {report['tuned']['path']}")


@_command
def explain(
    recipe: Path,
    set: Set = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Show so many rows as the model will see them.")] = 0,
    debug: Debug = False,
) -> None:
    """Show what a recipe's plan will do, before any training. Checks the plan on the real model."""
    _start(debug)
    from rich.console import Console
    from rich.table import Table

    from holdfast.verbs.tune import load_recipe, planned

    job = planned(load_recipe(recipe, set or []), recipe.absolute().parent)
    session, training, task = job.session, job.training, job.task
    table = Table("method", "sites", "does", "settings", title=f"{task.name}: {training.num_steps} steps")
    for row in session.plan.explain():
        settings = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
        table.add_row(row["method"], ", ".join(row["sites"]), row["does"], settings)
    Console().print(table)
    extra = [m.name for m in session.methods if "base_logits" in m.needs]
    if extra:
        Console().print(f"The base's answers are computed once before training, for: {', '.join(extra)}.")
    if task.note:
        Console().print(f"Note: {task.note}.", markup=False, highlight=False)
    if rows:
        from holdfast.report.seen import seen_rows, show_rows

        show_rows(seen_rows(job, rows), Console())


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Suites = Annotated[
    list[str],
    typer.Option("--suite", help="default, all, a suite, lm_eval:<task>[:k] or jsonl:<path>; may be repeated."),
]
Labels = Annotated[
    str, typer.Option("--labels", help="Answers of the tuned task, with commas: the format suite looks for them.")
]
Shots = Annotated[int, typer.Option("--num-fewshot", help="Demonstrations in a prompt.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Items of each task (default: each suite's own).")]
BatchTokens = Annotated[
    int, typer.Option("--batch-tokens", min=1, help="Tokens scored in one forward pass: fewer need less memory.")
]
Out = Annotated[
    list[Path] | None, typer.Option("--out", help="Write .json, .html, .md or .xml (JUnit); may be repeated.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")]


@_command
def measure(
    model: str,
    revision: Revision = None,
    suite: Suites = ["default"],  # noqa: B006
    num_fewshot: Shots = 8,
    limit: Limit = None,
    labels: Labels = "",
    batch_tokens: BatchTokens = BATCH_TOKENS,
    out: Annotated[Path | None, typer.Option("--out", help="Write the scores of every item as JSON.")] = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure what one model can do."""
    _start(debug)
    from holdfast.engine import processes

    processes.start()
    from rich.console import Console

    from holdfast.files import write_json
    from holdfast.report import terminal
    from holdfast.report.progress import progress_on
    from holdfast.verbs import check as checking

    if out:
        checking.may_write(out, ())
    console = Console()
    with progress_on(console) as progress:
        got = checking.measure(
            model,
            revision=revision,
            suites=suite,
            num_fewshot=num_fewshot,
            limit=limit,
            labels=_labels(labels),
            batch_tokens=batch_tokens,
            trust_remote_code=trust_remote_code,
            tell=progress.tell,
        )
    terminal.show_measured(got["suites"], console)
    if out and processes.first():
        write_json(out, got)


def _labels(text: str) -> tuple[str, ...]:
    return tuple(label.strip() for label in text.split(",") if label.strip())


@_command
def check(
    base: str,
    tuned: str,
    keep: Annotated[list[str] | None, typer.Option("--keep", help="Share to keep, such as in-context=0.97.")] = None,
    suite: Suites = ["default"],  # noqa: B006
    num_fewshot: Shots = 8,
    limit: Limit = None,
    labels: Labels = "",
    batch_tokens: BatchTokens = BATCH_TOKENS,
    why: Annotated[bool, typer.Option("--why", help="Also look for the place and the kind of a loss.")] = False,
    base_revision: Revision = None,
    tuned_revision: Revision = None,
    out: Out = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> int:
    """Gate: does TUNED keep what BASE can do? Exit 0 kept, 1 lost, 3 not enough evidence, 2 usage, 70 our fault."""
    _start(debug)
    from holdfast.engine import processes

    processes.start()
    from rich.console import Console

    from holdfast.errors import HoldfastError
    from holdfast.report import terminal
    from holdfast.report.progress import progress_on
    from holdfast.verbs import check as checking

    floors = {}
    for item in keep or []:
        name, _, value = item.partition("=")
        try:
            floors[name] = float(value)
        except ValueError:
            raise HoldfastError(
                f"--keep {item!r} is not of the form ability=share.", "Write in-context=0.97."
            ) from None
        if not 0 < floors[name] < 1:
            raise HoldfastError(f"--keep {item!r}: a share to keep lies between 0 and 1.", "Write in-context=0.97.")
    for path in out or []:
        checking.may_write(path)
    console = Console()
    with progress_on(console) as progress:
        report = checking.check(
            base,
            tuned,
            base_revision=base_revision,
            tuned_revision=tuned_revision,
            keep=floors,
            suites=suite,
            num_fewshot=num_fewshot,
            limit=limit,
            labels=_labels(labels),
            batch_tokens=batch_tokens,
            why=why,
            trust_remote_code=trust_remote_code,
            tell=progress.tell,
        )
    terminal.show(report, console)  # before the files: a full disk hides no verdict
    for finding in report["diagnosis"] or ():
        console.print(f"{finding['name']}: {finding['finding']}", markup=False, highlight=False)
    for path in (out or []) if processes.first() else []:
        checking.write(report, path)
    return checking.EXIT[report["verdict"]["status"]]


@_command
def suites(
    name: Annotated[str | None, typer.Argument(help="One suite, in full.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write it as tasks of lm-evaluation-harness here.")] = None,
    model: Annotated[str, typer.Option(help="Whose prompt formats and chat template to use.")] = "smollm2-135m",
    num_fewshot: Shots = 8,
    limit: Limit = None,
    debug: Debug = False,
) -> None:
    """List the suites of abilities, show one in full, or export it for plain lm_eval."""
    _start(debug)
    from rich.console import Console
    from rich.table import Table

    from holdfast.measure.names import DEFAULT, SUITES, about, names_of

    if name is None:
        table = Table("suite", "in the default", "what it measures")
        for suite in SUITES:
            table.add_row(suite, "yes" if suite in DEFAULT else "", about(suite)[0])
        Console().print(table)
        return
    names_of([name])
    if export is None:
        print(about(name)[1] if name in SUITES else f"{name}: yours, or another tool's.")
        return
    from holdfast import models
    from holdfast.measure.export import export_suite
    from holdfast.measure.probe import Ask
    from holdfast.measure.suites import build

    tokenizer = models.load_tokenizer(models.resolve(model), False)
    for part in export_suite(build(name, Ask(tokenizer, num_fewshot, limit)), export):
        print(part.task, part.warning)
    print(f"lm_eval --model hf --model_args pretrained=... --include_path {export} --tasks holdfast_{name}")


@_command
def methods(name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None) -> None:
    """List the methods, or show one in full."""
    import dataclasses
    import inspect

    from rich.console import Console
    from rich.table import Table

    from holdfast.errors import PlanError, suggest
    from holdfast.methods import all_methods

    known = all_methods()
    if name:
        if name not in known:
            raise PlanError(f"There is no method {name!r}.", suggest(name, tuple(known)))
        print(inspect.getdoc(sys.modules[known[name].__module__]))
        print("\nSettings:")
        for f in dataclasses.fields(known[name]):
            print(f"  {f.name} = {f.default!r}")
        return
    table = Table("method", "sites", "does", "paper")
    for kind in known.values():
        table.add_row(kind.__name__, ", ".join(kind().sites()), kind.does, _paper(kind))
    Console().print(table)


def _paper(kind: Any) -> str:
    return f"arXiv {kind.paper.arxiv}" if kind.paper and kind.paper.arxiv else "-"


@_command
def recipe() -> None:
    """List every key of a recipe with its default."""
    from holdfast.recipe import recipe_schema

    print(recipe_schema())


@_command
def doctor() -> None:
    """Show what this machine and installation have (paste it into a bug report)."""
    import platform

    from holdfast.models import cache_dir
    from holdfast.versions import versions

    facts: dict[str, Any] = dict(versions())
    facts["system"] = platform.platform()
    try:
        import torch

        facts["threads"] = torch.get_num_threads()
        facts["cpu"] = torch.backends.cpu.get_cpu_capability()
        facts["cuda"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    except Exception as e:  # a broken installation is what a bug report is about
        facts["torch"] = f"{facts.get('torch', 'missing')}, does not work: {type(e).__name__}: {e}"
    facts["cache"] = str(cache_dir())
    for key, value in facts.items():
        print(f"{key:14} {value}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from holdfast.versions import __version__

        print(__version__)
        raise typer.Exit()


def main() -> None:
    """Run the command line; every end but a verdict has its own exit code and one message (see `ending`)."""
    global _debug
    _debug = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without a sign for a letter is no error
    try:
        app()
        code = 0
    except _Ended as e:
        code = e.code if e.error is None else ending.end(e.error, e.command, _debug)
    except SystemExit as e:  # --help, --version or a wrong option; 1 only where the help has no reader
        code = ending.UNREAD if e.code == 1 else int(e.code or 0)
    except BaseException as e:
        code = ending.end(e, "", _debug)
    sys.exit(ending.flushed(code))


if __name__ == "__main__":
    main()
