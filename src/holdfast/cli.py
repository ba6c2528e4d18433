"""The command line. Exit codes: 0 done (check: kept), 1 lost, 2 a mistake that can be mended, 3 not enough evidence."""

from __future__ import annotations

import sys
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


@app.command()
def tune(recipe: Path, set: Set = None, debug: Debug = False) -> None:
    """Measure, tune under a plan, measure again, report and export."""
    global _debug
    _debug = debug
    from rich.console import Console

    from holdfast.progress import Bars
    from holdfast.report import terminal
    from holdfast.run import Run, load_recipe

    console = Console()
    loaded = load_recipe(recipe, set or [])
    with Bars(console) as bars:
        run = Run(loaded, recipe.resolve().parent, bars.tell)
        was_done = run.finished
        folder = run.go()
    import json

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if was_done:
        console.print(f"This run was finished before; nothing was done. Its folder: {folder}")
    terminal.show(report, console, folder / "report.html")
    console.print(f"Tuned model: {folder / 'model'}", soft_wrap=True)


@app.command()
def explain(recipe: Path, set: Set = None, debug: Debug = False) -> None:
    """Show what a recipe's plan will do, before any training. Checks the plan on the real model."""
    global _debug
    _debug = debug
    from rich.console import Console
    from rich.table import Table

    from holdfast.run import load_recipe, planned

    session, training, task = planned(load_recipe(recipe, set or []), recipe.resolve().parent)
    table = Table("method", "sites", "does", "settings", title=f"{task.name}: {training.num_steps} steps")
    for row in session.plan.explain():
        settings = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
        table.add_row(row["method"], ", ".join(row["sites"]), row["does"], settings)
    Console().print(table)
    extra = [m.name for m in session.methods if "base_logits" in m.needs]
    if extra:
        Console().print(f"The base's answers are computed once before training, for: {', '.join(extra)}.")


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
        table.add_row(kind.__name__, ", ".join(kind().sites()), kind.does, f"arXiv {kind.paper.arxiv}")
    Console().print(table)


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
    """Run the command line; a HoldfastError is one message and exit code 2."""
    from holdfast.errors import HoldfastError

    try:
        app()
    except HoldfastError as e:
        if _debug:
            raise
        print(f"Error: {e.what}", file=sys.stderr)
        if e.cure:
            print(f"       {e.cure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if _debug:
            raise
        print(f"Error: {e.strerror or e} ({e.filename or 'no file named'}).", file=sys.stderr)
        print("       Check the path, its rights and the free disk space; nothing finished was lost.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
