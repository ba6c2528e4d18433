"""A made-up but realistic report: the shape of a real run on a small model, with invented numbers."""

import math
import random
from typing import Any

TASKS = [
    ("antonyms", 0.25, 0.62, 0.61), ("capitals", 0.25, 0.71, 0.69), ("plurals", 0.0, 0.83, 0.84),
    ("past-tense", 0.0, 0.55, 0.52), ("colour-of-thing", 0.1, 0.48, 0.47), ("first-letter", 0.04, 0.66, 0.67),
    ("larger-number", 0.5, 0.58, 0.57), ("animal-or-plant", 0.5, 0.77, 0.74),
    ("sentiment-of-a-short-sentence", 0.5, 0.69, 0.55),
    ("language-of-a-word", 0.2, 0.34, 0.35), ("count-to-five", 0.2, 0.22, 0.22), ("rhyme", 0.0, 0.09, 0.08),
    ("reverse-two-words", 0.0, 0.18, 0.17), ("abstract-labels", 0.5, 0.53, 0.52),
]  # fmt: skip


def est(value: float, n: int = 240, half: float | None = None) -> dict[str, Any]:
    """An estimate with a normal interval of the width that n items give."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.01) / n) if half is None else half
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def _task(name: str, chance: float, before: float, after: float) -> dict[str, Any]:
    status = "lost" if after < before - 0.1 else "unclear" if after < before - 0.025 else "kept"
    row = {"name": name, "n": 120, "chance": chance, "metric": "exact match", "status": status}
    held = {
        "before": est(before, 120),
        "after": est(after, 120),
        "difference": est(after - before, 120, 0.04),
    }
    for e in (held["before"], held["after"]):
        e["low"], e["high"] = max(0.0, e["low"]), min(1.0, e["high"])
    return {**row, **held}


def _curve() -> dict[str, Any]:
    before, after = (0.08, 0.24, 0.34, 0.42, 0.47, 0.49), (0.11, 0.25, 0.33, 0.41, 0.46, 0.48)
    return {
        "shots": [0, 1, 2, 4, 8, 16],
        "before": [est(v, 600) for v in before],
        "after": [est(v, 600) for v in after],
    }


def _abilities() -> list[dict[str, Any]]:
    return [
        {
            "name": "in-context",
            "before": est(0.471, 1680),
            "after": est(0.462, 1680),
            "difference": est(-0.009, 1680, 0.011),
            "retention": {"value": 0.981, "low": 0.944, "high": 1.012},
            "margin": 0.03,
            "status": "kept",
            "note": None,
            "curve": _curve(),
            "tasks": [_task(*t) for t in TASKS],
        },
        {
            "name": "instruction following",
            "before": est(0.38, 200),
            "after": est(0.35, 200),
            "difference": est(-0.03, 200, 0.035),
            "retention": {"value": 0.921, "low": 0.83, "high": 1.01},
            "margin": 0.03,
            "status": "unclear",
            "note": "200 items are too few to be sure; 700 would be enough.",
            "curve": None,
            "tasks": [],
        },
        {
            "name": "world facts",
            "before": est(0.29, 400),
            "after": est(0.21, 400),
            "difference": est(-0.08, 400, 0.03),
            "retention": {"value": 0.724, "low": 0.62, "high": 0.83},
            "margin": 0.03,
            "status": "lost",
            "note": None,
            "curve": None,
            "tasks": [],
        },
        {
            "name": "arithmetic",
            "before": est(0.02, 200),
            "after": est(0.01, 200),
            "difference": est(-0.01, 200, 0.02),
            "retention": None,
            "margin": 0.03,
            "status": "not measurable",
            "note": "The base model scores no better than guessing: there is nothing to lose.",
            "curve": None,
            "tasks": [],
        },
    ]


def _training() -> dict[str, Any]:
    noise = random.Random(0)
    loss = [[s, 0.35 + 2.1 * math.exp(-s / 22) + noise.gauss(0, 0.05)] for s in range(1, 121)]
    anchor = [[s, 0.02 + 0.05 * (1 - math.exp(-s / 15)) + noise.gauss(0, 0.004)] for s in range(1, 121)]
    mix = {"sst2": {"examples": 960, "tokens": 41213}, "other-tasks": {"examples": 240, "tokens": 88120}}
    rate = {"steps": 120, "seconds": 192.4, "tokens": 129333, "tokens_per_second": 672.2}
    return {**rate, "loss": loss, "terms": {"ICLAnchor": anchor}, "realised_mix": mix}


def _examples() -> list[dict[str, Any]]:
    shots = "Word: happy\nOpposite: sad\n\nWord: tall\nOpposite: short\n\nWord: early\nOpposite:"
    return [
        {"task": "antonyms", "prompt": shots, "expected": "late", "before": "late", "after": "positive"},
        {
            "task": "capitals",
            "prompt": "Country: France\nCapital: Paris\n\nCountry: Peru\nCapital:",
            "expected": "Lima",
            "before": "Lima",
            "after": "The capital of Peru is a city of about ten million people on the Pacific coast.",
        },
        {"task": "rhyme", "prompt": "Word: cat\nRhyme:", "expected": "hat", "before": "hat", "after": ""},
    ]


def _plan() -> list[dict[str, Any]]:
    return [
        {
            "method": "FullFinetune",
            "settings": {"lr": 2e-5, "warmup_steps": 10},
            "sites": ["parameters"],
            "does": "Trains every weight of the model.",
            "paper": None,
        },
        {
            "method": "ICLAnchor",
            "settings": {"weight": 1.0, "shots": [2, 8], "temperature": 1.0},
            "sites": ["loss", "sources"],
            "does": "Holds the answers of the base model on few-shot prompts of tasks that are not yours.",
            "paper": {"title": "Learning without Forgetting", "arxiv": "1606.09282"},
        },
    ]


def example() -> dict[str, Any]:
    """A whole report of a `tune` run with every optional part and one ability of every status."""
    sentence = "The task was learned, and the tuned model lost world facts: 0.29 before, 0.21 after."
    table = [
        ["layer", "relative change", "intruder dimensions"],
        *[[i, 0.01 * i + 0.003, i // 3] for i in range(6)],
    ]
    return {
        "holdfast_version": "0.1.0",
        "created": "2026-01-15T09:30:00+00:00",
        "kind": "tune",
        "verdict": {"status": "lost", "sentence": sentence},
        "model": {
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": "main",
            "sha": "12fd25f77366fa6b",
            "dtype": "float32",
        },
        "tuned": {"name": "sst2-anchored", "path": "runs/sst2-anchored/model", "sha": "9b1c0f5512ab77de"},
        "task": {
            "name": "sst2",
            "metric": "accuracy",
            "chance": 0.5,
            "before": est(0.487, 300),
            "after": est(0.86, 300),
            "difference": est(0.373, 300, 0.062),
            "split": "test",
            "note": None,
        },
        "abilities": _abilities(),
        "plan": _plan(),
        "training": _training(),
        "examples": _examples(),
        "diagnosis": [
            {
                "name": "Where the weights moved",
                "finding": "The last third of the layers moved most.",
                "detail": "Relative change of each layer, in the Frobenius norm.",
                "table": table,
            }
        ],
        "timing": {"measure before": 41.2, "train": 192.4, "measure after": 43.9},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"},
        "settings": {"num_fewshot": 8, "seeds": [0, 1, 2], "batch_size": 16},
        "prompts": [{"task": "antonyms", "text": "Word: happy\nOpposite: sad\n\nWord: early\nOpposite:"}],
        "recipe": "model: HuggingFaceTB/SmolLM2-135M-Instruct\nplan:\n  - ICLAnchor: {weight: 1.0}\n",
    }


def points() -> list[dict[str, Any]]:
    """Seven methods of the trade-off plot, four of them crowded."""
    rows = [
        ("base", 0.487, 1.0),
        ("full", 0.893, 0.085),
        ("LoRA r16", 0.867, 0.0),
        ("full + few-shot rows", 0.827, 0.234),
        ("full + ICL anchor", 0.86, 0.981),
        ("full + EWC", 0.855, 0.96),
        ("full + L2-SP", 0.85, 0.97),
    ]
    return [{"name": n, "task": est(t, 300), "kept": est(k, 300, 0.04), "highlight": "ICL" in n} for n, t, k in rows]
