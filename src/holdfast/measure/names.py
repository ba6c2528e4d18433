"""The names of the suites, and what each measures: loads no suite and no torch."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from holdfast.errors import HoldfastError, pip_install, suggest

SUITES = {
    "in-context": "in_context:build_suite",
    "format": "format:build_suite",
    "language": "language:build_suite",
    "knowledge": "knowledge:build_suite",
    "instructions": "instructions:build_suite",
    "reasoning": "reasoning:build_suite",
    "safety": "safety:build_suite",
    "calibration": "calibration:build_suite",
    "shots": "shots:build_suite",
    "recognition": "recognition:build_suite",
    "copying": "copying:build_suite",
    "tools": "tools:build_suite",
    "thinking": "thinking:build_suite",
    "anchors": "in_context:build_anchors",
}
DEFAULT = ("in-context", "format", "language", "knowledge", "instructions", "reasoning", "safety")


def names_of(asked: Sequence[str]) -> tuple[str, ...]:
    """The suites meant by `asked`: "default" and "all" are several; checked, each once.

    Raises:
        HoldfastError: a suite is unknown, or asks lm-evaluation-harness, which is not installed.
    """
    several = {"default": DEFAULT, "all": tuple(s for s in SUITES if s != "anchors")}
    names = tuple(dict.fromkeys(n for a in asked for n in several.get(a, (a,))))
    for name in names:
        if name not in SUITES and not name.startswith(("lm_eval:", "jsonl:")):
            cure = suggest(name, (*SUITES, *several))
            raise HoldfastError(f"There is no suite {name!r}.", f"{cure} Or use lm_eval:<task> or jsonl:<path>.")
        if name.startswith("lm_eval:") and find_spec("lm_eval") is None:  # said here, before any long work
            what = f"The suite {name!r} needs lm-evaluation-harness, which is not installed."
            raise HoldfastError(what, f"Run: {pip_install('eval')}.")
    return names


def about(name: str) -> tuple[str, str]:
    """(what a suite measures in one sentence, its whole description)."""
    module, function = SUITES[name].split(":")
    source = (Path(__file__).parent / "suites" / f"{module}.py").read_text(encoding="utf-8")
    doc = inspect.cleandoc(ast.get_docstring(ast.parse(source)) or "")
    first = doc.split("\n\n")[0].replace("\n", " ").partition(": ")[2]
    if function == "build_anchors":
        first = "the same on the tasks that a plan may train on (their gap to in-context shows mere memory)"
    return first, doc
