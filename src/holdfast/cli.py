"""The command line. Exit codes: 0 done (check: kept), 1 lost, 2 a mistake to mend, 3 not enough evidence."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model without losing what it knows, and prove it.",
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key, such as training.seed=1.")]
_debug = False


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
    from holdfast.measure import shard

    shard.start()
    return shard.first()


@app.command()
def tune(recipe: Path, set: Set = None, debug: Debug = False) -> None:
    """Measure, tune under a plan, measure again, report and export."""
    _start(debug)
    import json

    from rich.console import Console

    from holdfast.progress import progress_on
    from holdfast.report import terminal
    from holdfast.run import Run, load_recipe

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


@app.command()
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

    from holdfast.run import load_recipe, planned

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
Out = Annotated[
    list[Path] | None, typer.Option("--out", help="Write .json, .html, .md or .xml (JUnit); may be repeated.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")]


@app.command()
def measure(
    model: str,
    revision: Revision = None,
    suite: Suites = ["default"],  # noqa: B006
    num_fewshot: Shots = 8,
    limit: Limit = None,
    labels: Labels = "",
    out: Annotated[Path | None, typer.Option("--out", help="Write the scores of every item as JSON.")] = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure what one model can do."""
    _start(debug)
    from holdfast.measure import shard

    shard.start()
    from rich.console import Console

    from holdfast import check as checking
    from holdfast.progress import progress_on
    from holdfast.report import terminal
    from holdfast.run import write_json

    console = Console()
    with progress_on(console) as progress:
        got = checking.measure(
            model,
            revision=revision,
            suites=suite,
            num_fewshot=num_fewshot,
            limit=limit,
            labels=_labels(labels),
            trust_remote_code=trust_remote_code,
            tell=progress.tell,
        )
    terminal.show_measured(got["suites"], console)
    if out and shard.first():
        write_json(out, got)


def _labels(text: str) -> tuple[str, ...]:
    return tuple(label.strip() for label in text.split(",") if label.strip())


@app.command()
def check(
    base: str,
    tuned: str,
    keep: Annotated[list[str] | None, typer.Option("--keep", help="Share to keep, such as in-context=0.97.")] = None,
    suite: Suites = ["default"],  # noqa: B006
    num_fewshot: Shots = 8,
    limit: Limit = None,
    labels: Labels = "",
    why: Annotated[bool, typer.Option("--why", help="Also look for the place and the kind of a loss.")] = False,
    base_revision: Revision = None,
    tuned_revision: Revision = None,
    out: Out = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Gate: does TUNED keep what BASE can do? Exit 0 kept, 1 lost, 2 usage, 3 not enough evidence."""
    _start(debug)
    from holdfast.measure import shard

    shard.start()
    from rich.console import Console

    from holdfast import check as checking
    from holdfast.errors import HoldfastError
    from holdfast.progress import progress_on
    from holdfast.report import terminal

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
            why=why,
            trust_remote_code=trust_remote_code,
            tell=progress.tell,
        )
    for path in (out or []) if shard.first() else []:
        checking.write(report, path)
    terminal.show(report, console)
    for finding in report["diagnosis"] or ():
        console.print(f"{finding['name']}: {finding['finding']}", markup=False, highlight=False)
    raise typer.Exit(checking.EXIT[report["verdict"]["status"]])


@app.command()
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

    from holdfast.measure.suites import DEFAULT, SUITES, about, names_of

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


@app.command()
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


@app.command()
def recipe() -> None:
    """List every key of a recipe with its default."""
    from holdfast.recipe import recipe_schema

    print(recipe_schema())


@app.command()
def doctor() -> None:
    """Show what this machine and installation have (paste it into a bug report)."""
    import platform

    import torch

    from holdfast.models import cache_dir
    from holdfast.run import versions

    facts: dict[str, Any] = dict(versions())
    facts["system"] = platform.platform()
    facts["threads"] = torch.get_num_threads()
    facts["cpu"] = torch.backends.cpu.get_cpu_capability()
    facts["cuda"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    facts["cache"] = str(cache_dir())
    for key, value in facts.items():
        print(f"{key:14} {value}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from holdfast import __version__

        print(__version__)
        raise typer.Exit()


def main() -> None:
    """Run the command line; a mistake is one message and exit code 2, never a traceback (unless --debug)."""
    global _debug
    _debug = False
    from holdfast.errors import HoldfastError

    try:
        app()
    except SystemExit as e:
        if e.code == 130:  # Ctrl-C, as typer reports it
            print("Stopped. The same command goes on from where it was.", file=sys.stderr)
        raise
    except HoldfastError as e:
        _fail(e, e.what, e.cure)
    except OSError as e:
        cure = "Check the path, its rights and the free disk space; nothing finished was lost."
        _fail(e, f"{e.strerror or e} ({e.filename or 'no file named'}).", cure)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not any(w in str(e) for w in ("out of memory", "allocate memory")):
            raise
        cure = "Lower training.per_device_train_batch_size and raise gradient_accumulation_steps by as much."
        _fail(e, "There is not enough memory for this run.", cure)


def _fail(error: BaseException, what: str, cure: str) -> None:
    if _debug:
        raise error
    if os.environ.get("RANK", "0") != "0":  # the first process mostly says the same, and torchrun then ends this one
        time.sleep(3)
    print(f"Error: {what}" + (f"\n       {cure}" if cure else ""), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
