"""The command line: what can be typed. What a command does is told in `verbs`, one file each, and loaded on use.

Exit codes: 0 done (check, repair: kept), 1 check: lost, repair and tune: bound not met, compare: a run failed,
2 a mistake to mend, 3 not enough evidence, 70 a fault of ours; `ending` says how errors get theirs.
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


def _labels(text: str) -> tuple[str, ...]:
    return tuple(label.strip() for label in text.split(",") if label.strip())


@_command
def tune(
    recipe: Path,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Run it so many times; the verdict is then about the recipe.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            help="Share that must stay, such as in-context=0.99; default: of all default suites; none: of nothing.",
        ),
    ] = None,
    set: Set = None,
    debug: Debug = False,
) -> int:
    """Measure, tune under a plan, measure again, report and export. Exit 1: what must stay could not be kept."""
    _start(debug)
    from holdfast.verbs import tune as verb

    return verb.command(recipe, set or (), seeds, keep or ())


@_command
def explain(
    recipe: Path,
    set: Set = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Show so many rows as the model will see them.")] = 0,
    debug: Debug = False,
) -> None:
    """Show what a recipe's plan will do, before any training. Checks the plan on the real model."""
    _start(debug)
    from holdfast.verbs import explain as verb

    verb.command(recipe, set or (), rows)


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
Invariant = Annotated[
    bool, typer.Option("--invariant", help="The same bits whatever --batch-tokens and other items are; slower.")
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
    invariant: Invariant = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the scores of every item as JSON.")] = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure what one model can do."""
    _start(debug)
    from holdfast.verbs import measure as verb

    verb.command(
        model,
        out=out,
        revision=revision,
        suites=suite,
        num_fewshot=num_fewshot,
        limit=limit,
        labels=_labels(labels),
        batch_tokens=batch_tokens,
        invariant=invariant,
        trust_remote_code=trust_remote_code,
    )


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
    invariant: Invariant = False,
    why: Annotated[bool, typer.Option("--why", help="Also look for the place and the kind of a loss.")] = False,
    cause: Annotated[
        list[str] | None,
        typer.Option("--cause", help="A further diagnosis, such as 'mode connectivity'; may be repeated."),
    ] = None,
    ancestor: Annotated[
        str | None, typer.Option("--ancestor", help="The model BASE was tuned from, for 'safety subspaces'.")
    ] = None,
    base_revision: Revision = None,
    tuned_revision: Revision = None,
    out: Out = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> int:
    """Gate: does TUNED keep what BASE can do? Exit 0 kept, 1 lost, 3 not enough evidence, 2 usage, 70 our fault."""
    _start(debug)
    from holdfast.verbs import check as verb

    return verb.command(
        base,
        tuned,
        keep=keep or (),
        out=out or (),
        base_revision=base_revision,
        tuned_revision=tuned_revision,
        suites=suite,
        num_fewshot=num_fewshot,
        limit=limit,
        labels=_labels(labels),
        batch_tokens=batch_tokens,
        invariant=invariant,
        why=why,
        causes=tuple(cause or ()),
        ancestor=ancestor,
        trust_remote_code=trust_remote_code,
    )


@_command
def repair(
    base: str,
    tuned: str,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model, the curve and the page.")],
    also: Annotated[
        list[str] | None, typer.Option("--also", help="Another tuned model, for soups with TUNED; may be repeated.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Rows of the task that the tuning has not seen.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Template over the columns of --data.")] = None,
    completion: Annotated[str | None, typer.Option("--completion", help="The same of the answer.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="How the task is scored (data.metric).")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Without --data: prompts whose answers should stay.")
    ] = None,
    harmful: Annotated[
        str | None, typer.Option("--harmful", help="Harmful prompts with answers, for antidote and realign.")
    ] = None,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Merge common tokens where the two vocabularies differ.")
    ] = False,
    keep: Annotated[list[str] | None, typer.Option("--keep", help="Share to keep, such as in-context=0.97.")] = None,
    suite: Suites = ["in-context"],  # noqa: B006
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Which merges are tried; may be repeated.")
    ] = None,
    num_fewshot: Shots = 8,
    limit: Limit = None,
    labels: Labels = "",
    batch_tokens: BatchTokens = BATCH_TOKENS,
    debug: Debug = False,
) -> int:
    """Give TUNED abilities of BASE back by merging. Exit 0 kept, 1 bound not met, 3 not enough evidence, 2 usage."""
    _start(debug)
    from holdfast.verbs import repair as verb

    chosen = {"methods": tuple(method)} if method else {}
    return verb.command(
        base,
        tuned,
        keep=keep or (),
        out=out,
        also=tuple(also or ()),
        data=data,
        prompt=prompt,
        completion=completion,
        metric=metric,
        prompts=prompts,
        harmful=harmful,
        overlap=overlap,
        suites=tuple(suite),
        num_fewshot=num_fewshot,
        limit=limit,
        labels=_labels(labels),
        batch_tokens=batch_tokens,
        **chosen,
    )


@_command
def compare(
    recipe: Path,
    methods: Annotated[
        str, typer.Option("--methods", help="Plans with commas: default, plain, recipe, or methods with + between.")
    ] = "default,plain,LoRA",
    factor: Annotated[
        list[float] | None,
        typer.Option("--factor", help="What the learning rate is multiplied by; repeated (default: 1/3, 1 and 3)."),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option("--strength", help="What the strength of each method is multiplied by; repeated (default: 1)."),
    ] = None,
    search: Annotated[
        int | None, typer.Option("--search", help="So many trials of each plan by Optuna, instead of the grid.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each plan at its best settings.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Do the runs on a Ray cluster (RAY_ADDRESS, else here).")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs, the table and the page.")] = Path(
        "runs/compared"
    ),
    set: Set = None,
    debug: Debug = False,
) -> int:
    """Compare plans on one recipe: each at its best settings, told apart on items that chose nothing."""
    _start(debug)
    from holdfast.verbs import compare as verb

    return verb.command(
        recipe,
        set or (),
        methods=methods.split(","),
        factors=factor,
        strengths=strength,
        search=search,
        seeds=seeds,
        ray=ray,
        out=out,
    )


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
    from holdfast.verbs import suites as verb

    verb.command(name, export, model=model, num_fewshot=num_fewshot, limit=limit)


@_command
def methods(name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None) -> None:
    """List the methods, or show one in full."""
    from holdfast.verbs import methods as verb

    verb.command(name)


@_command
def init(
    data: Annotated[list[str], typer.Argument(help="File, folder, hub id; several become sets of one task.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the recipe goes.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Base model that the recipe names.")] = "smollm2-135m",
    debug: Debug = False,
) -> None:
    """Write a commented recipe for a data file: columns found, metric proposed."""
    _start(debug)
    from holdfast.verbs import init as verb

    verb.command(data, out, model)


@_command
def recipe(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """List every key of a recipe with its default."""
    from holdfast.verbs import recipe as verb

    verb.command(schema)


@_command
def doctor() -> None:
    """Show what this machine and installation have (paste it into a bug report)."""
    from holdfast.verbs import doctor as verb

    verb.command()


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
