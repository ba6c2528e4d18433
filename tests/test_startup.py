"""What is light stays light: heavy libraries are imported only where they are used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "scipy", "matplotlib", "trl"}
VERBS = ("tune", "explain", "measure", "check", "suites", "methods", "recipe", "doctor", "ending")
LIGHT = ("holdfast", "holdfast.cli", "holdfast.models", "holdfast.recipe", "holdfast.data.rows", "holdfast.runs.run",
         "holdfast.diagnose", "holdfast.report.page", "holdfast.report.terminal", "holdfast.report.writing",
         *(f"holdfast.verbs.{verb}" for verb in VERBS))  # fmt: skip


def loaded_by(*modules: str, where: Path | None = None) -> str:
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=where).stdout


def test_a_command_line_and_a_recipe_need_no_heavy_library():
    assert loaded_by(*LIGHT) == "[]\n"


def test_the_benchmark_of_startup_does_not_hide_an_import():
    assert loaded_by("startup", where=BENCHMARKS) == "[]\n"


def test_the_table_of_startup_names_every_part(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import startup

    seconds = {"help": [0.25, 0.2], **{part: [n + 1.0, n + 0.5] for n, part in enumerate(startup.PARTS)}}
    path = tmp_path / "startup.json"
    path.write_text(json.dumps({"model": "some-model", "times": 5, "seconds": seconds}))
    lines = startup.table(path)
    assert "| load some-model, second time | 4.00 | 3.50 |" in lines and len(lines) == 2 + 5 + 2
    assert startup.middle([(1.0, 9.0), (3.0, 7.0), (2.0, 8.0)]) == pytest.approx((2.0, 8.0))
    sys.modules.pop("startup")
