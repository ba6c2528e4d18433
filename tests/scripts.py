"""The scripts of benchmarks/, for their tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
LEADERBOARD = (
    "_common",
    "leaderboard_plans",
    "leaderboard_cells",
    "leaderboard_talk",
    "leaderboard_peers",
    "leaderboard_cell",
    "leaderboard_table",
)


@contextmanager
def scripts(*names: str) -> Iterator[SimpleNamespace]:
    """The scripts by name, imported as they import each other; forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: __import__(name) for name in names})
        for name in names:
            sys.modules.pop(name)
