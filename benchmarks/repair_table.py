"""The results of `repair.py`: files of a few kilobytes, the tables of docs/repair.md, and a picture of a page.

A file has one line for each figure and each point: [label, method, parts, task, its interval, kept, its interval].

The area of a method is that of `compare`: what its points, and the tuned model, dominate of the share of the tuning's
gain in the task times the share of the ability kept, each from 0 to 1. Plain interpolation is WiSE-FT with one alpha.
All points of a search are those of its coarse look: the same items, which also chose.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Data = dict[str, Any]
ABILITY, PLAIN, BENT = "in-context", "WiSEFT", "WiSEFT, bent"
FEW = ("facts", "load", "seconds", "cpu_seconds", "phases", "limit", "rate", "beyond", "status", "sentence", "met")
FEW += ("keep",)
TASK_NAMES = {"sst2": "SST-2", "tickets": "tickets", "rte": "RTE", "agnews": "AG News"}
SIZE = (1060, 1130)  # of the picture, in pixels


# ---- files


def keep(target: Path, report: Mapping[str, Any]) -> None:
    """Write what the tables need of a repair's report, and the facts of the run."""
    from holdfast.files import write_text

    found: Data = {k: report[k] for k in FEW if k in report}
    sides, outcome = ("base", "tuned", "repaired"), report["report"]
    found["chosen"] = report["chosen"]["label"]
    found["task"] = {side: outcome["task"][side] for side in sides} | {"metric": outcome["task"]["metric"]}
    found["kept"] = {side: _own(outcome[side])["retention"] for side in ("tuned", "repaired")}
    points = [json.dumps(_point(p)) for p in report["points"]]
    lines = [*(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())]
    lines.append(' "points": [\n  ' + ",\n  ".join(points) + "\n ]")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, "{\n" + ",\n".join(lines) + "\n}\n")


def _own(abilities: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(a for a in abilities if a["name"] == ABILITY)


def _point(p: Mapping[str, Any]) -> list[Any]:
    def short(e: Mapping[str, Any] | None) -> list[Any]:
        return [None, None] if not e else [round(e["value"], 4), [round(e["low"], 4), round(e["high"], 4)]]

    label = re.sub(r"(?<!\S)/\S*/(\S+)", r"\1", p["label"])  # of a soup: models by their names, not by places
    method = BENT if p["method"] == PLAIN and "parts" in p["settings"] else p["method"]
    return [label, method, "+".join(p["parts"]), *short(p["task"]), *short(p["kept"].get(ABILITY))]


# ---- tables


def areas(points: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Method -> its area, on the coarse items; bent lines with the straight ones that they were bent from."""
    from holdfast.runs.compare_report import hypervolume

    ends = {p[1]: p for p in points if p[1] in ("base", "tuned model")}
    low, high = (ends[name][3] for name in ("base", "tuned model"))
    coarse = [p for p in points if p[2] == "coarse"]

    def corner(p: Sequence[Any]) -> tuple[float, float]:
        gain = (p[3] - low) / (high - low) if high > low else 0.0
        return min(1.0, max(0.0, gain)), min(1.0, max(0.0, p[5]))

    def area(*methods: str) -> float:
        return hypervolume([corner(p) for p in (ends["tuned model"], *coarse) if p[1] in ("tuned model", *methods)])

    return {m: area(m, PLAIN) if m == BENT else area(m) for m in dict.fromkeys(p[1] for p in coarse)}


def healed_table(folder: Path) -> list[str]:
    """A row for each `heal`, with the task's rows or without."""
    head = ["tuning", "prompts", "task: base", "tuned", "healed", "in-context kept: tuned", "healed", "CPU minutes"]
    rows = [_healed(f) for search in ("heal", "own") for f in sorted(folder.glob(f"*.{search}.json"))]
    return [*_head(head), *rows]


def _healed(file: Path) -> str:
    r = json.loads(file.read_text(encoding="utf-8"))
    task = r.get("beyond") or r["task"]
    scores = [f"{task[side]['value']:.3f}" for side in ("base", "tuned", "repaired")]
    shares = [_span(r["kept"][side]) for side in ("tuned", "repaired")]
    prompts = "drawn by the model" if "beyond" in r else "of the task"
    minutes = f"{r['cpu_seconds'] / 60:.1f}" if "cpu_seconds" in r else "-"
    return f"| {' | '.join([_named(file), prompts, *scores, *shares, minutes])} |"


def area_table(folder: Path) -> list[str]:
    """A row for each search by six methods: the area of each over that of plain interpolation."""
    found = {f: areas(_points(f) + _healed_points(f)) for f in sorted(folder.glob("*.six.json"))}
    methods = list(dict.fromkeys(m for own in found.values() for m in own if m != PLAIN))
    lines = _head(["tuning", "plain interpolation", *methods])
    for file, own in found.items():
        over = [f"{own[m] / own[PLAIN]:.2f}" if own.get(PLAIN) else "-" for m in methods]
        lines.append(f"| {' | '.join([_named(file), f'{own[PLAIN]:.2f}', *over])} |")
    return lines


def _points(file: Path) -> list[list[Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["points"]


def _healed_points(file: Path) -> list[list[Any]]:
    """Those of heal on the same items, from its own file."""
    other = file.with_name(file.name.replace(".six.", ".heal."))
    return [p for p in _points(other) if p[1] == "heal"] if other.exists() else []


def searched_table(folder: Path) -> list[str]:
    """A row for each search by several methods: what was chosen, and what it came to on other items."""
    head = ["tuning", "search", "chosen", "task: base", "tuned", "repaired", "in-context kept: tuned", "repaired",
            "minutes", "CPU minutes"]  # fmt: skip
    lines = _head(head)
    for file in sorted(f for s in ("six", "merges", "graft", "default") for f in folder.glob(f"*.{s}.json")):
        r = json.loads(file.read_text(encoding="utf-8"))
        scores = [f"{r['task'][side]['value']:.3f}" for side in ("base", "tuned", "repaired")]
        shares = [_span(r["kept"][side]) for side in ("tuned", "repaired")]
        times = [f"{r[k] / 60:.1f}" if k in r else "-" for k in ("seconds", "cpu_seconds")]
        lines.append(
            f"| {' | '.join([_named(file), file.stem.split('.')[3], r['chosen'], *scores, *shares, *times])} |"
        )
    return lines


def _named(file: Path) -> str:
    task, kind, seed, _ = file.stem.split(".")
    rate = json.loads(file.read_text(encoding="utf-8"))["rate"]
    return f"{TASK_NAMES[task]}, {'LoRA' if kind == 'lora' else kind} at {rate:g}, seed {seed}"


def _span(e: Mapping[str, Any]) -> str:
    return f"{e['value']:.2f} ({e['low']:.2f} to {e['high']:.2f})"


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def tables(folder: Path) -> dict[str, list[str]]:
    """The tables of the page by the name of their marks."""
    return {"healed": healed_table(folder), "searched": searched_table(folder), "areas": area_table(folder)}


def write_page(page: Path, folder: Path) -> None:
    """Put the tables between their marks."""
    put(page, "repair.py", tables(folder))


def put(page: Path, script: str, found: Mapping[str, Sequence[str]]) -> None:
    """Put lines between the marks of their names; everything else on the page is written by hand."""
    text = page.read_text(encoding="utf-8")
    for name, lines in found.items():
        start, end = f"<!-- {script}: {name} -->", f"<!-- end of {name} -->"
        assert start in text and end in text, f"{page} has no place for {name}"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


# ---- a picture


def picture(page: Path, target: Path) -> None:
    """Let chromium draw a page without a window, in few colours (Pillow)."""
    from PIL import Image

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as place:
        shot = Path(place) / "shot.png"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={SIZE[0]},{SIZE[1]}",
        ]
        flags += [f"--user-data-dir={place}/profile", f"--screenshot={shot}"]
        subprocess.run([str(chromium), *flags, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
        Image.open(shot).convert("RGB").quantize(64).save(target, optimize=True)
