"""methods: what a plan can be made of; one method in full."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from holdfast.errors import PlanError, suggest


def command(name: str | None) -> None:
    """`holdfast methods`: a list without a name; with one its formula, paper, cost and settings."""
    from holdfast.methods import all_methods

    known = all_methods()
    if not name:
        Console().print(_table(known))
        return
    if name not in known:
        raise PlanError(f"There is no method {name!r}.", suggest(name, tuple(known)))
    print(inspect.getdoc(sys.modules[known[name].__module__]))
    print("\nSettings:")
    for f in dataclasses.fields(known[name]):
        print(f"  {f.name} = {f.default!r}")


def _table(known: Mapping[str, Any]) -> Table:
    table = Table("method", "sites", "does", "paper")
    for kind in known.values():
        paper = f"arXiv {kind.paper.arxiv}" if kind.paper and kind.paper.arxiv else "-"
        table.add_row(kind.__name__, ", ".join(kind().sites()), kind.does, paper)
    return table
