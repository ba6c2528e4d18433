"""suites: what can be measured; one suite in full, or exported for plain lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from holdfast.measure.names import DEFAULT, SUITES, about, names_of


def command(name: str | None, export: Path | None, *, model: str, num_fewshot: int, limit: int | None) -> None:
    """`holdfast suites`: a list without a name; with one the suite in full, or its files in the folder `export`."""
    if name is None:
        Console().print(_table())
        return
    names_of([name])
    if export is not None:
        _export(name, export, model, num_fewshot, limit)
    else:
        print(about(name)[1] if name in SUITES else f"{name}: yours, or another tool's.")


def _table() -> Table:
    table = Table("suite", "in the default", "what it measures")
    for suite in SUITES:
        table.add_row(suite, "yes" if suite in DEFAULT else "", about(suite)[0])
    return table


def _export(name: str, folder: Path, model: str, num_fewshot: int, limit: int | None) -> None:
    """Write a suite as tasks of lm-evaluation-harness, with the prompt formats and chat template of `model`."""
    from holdfast import models
    from holdfast.measure.export import export_suite
    from holdfast.measure.probe import Ask
    from holdfast.measure.suites import build

    tokenizer = models.load_tokenizer(models.resolve(model), False)
    for part in export_suite(build(name, Ask(tokenizer, num_fewshot, limit)), folder):
        print(part.task, part.warning)
    print(f"lm_eval --model hf --model_args pretrained=... --include_path {folder} --tasks holdfast_{name}")
