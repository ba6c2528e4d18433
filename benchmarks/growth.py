"""How time and memory grow: model size, methods in a plan, sequence length, anchor prompts, suite items.

    python benchmarks/growth.py           # resumable; writes benchmarks/results/growth/*.json and docs/growth.png

Models of random weights, LoRA. Every point runs in a process of its own: median seconds of a training step (for
anchor prompts: of preparing them; for suite items: of measuring) and peak memory above that of the imported libraries.
The exponent is the slope of the logarithms, by least squares: 1 is linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import _common as C

STEEP = 1.1  # an exponent beyond the noise of linear growth
OUT = C.RESULTS / "growth"
PLOT = C.HERE.parent / "docs" / "growth.png"


def plan_of(count: int) -> list[Any]:
    """`count` methods that go together; LoRA, which the loop adds itself, is the first."""
    from holdfast import methods as M

    return [M.ICLAnchor(), M.KLToBase(), M.L2ToInit(), M.Replay(), M.DFT()][: count - 1]


AXES: dict[str, tuple[str, str, list[Any]]] = {  # name -> (x, what `seconds` is of, points)
    "size": ("parameters", "a step", ["10M", "30M", "100M", "300M", "1B"]),
    "methods": ("methods in the plan", "a step", [1, 2, 3, 4, 5, 6]),
    "length": ("tokens of a row (one row a step)", "a step", [128, 256, 512, 1024, 2048]),
    "anchors": ("anchor prompts", "preparing", [16, 64, 256, 1024]),
    "items": ("suite items", "measuring", [4, 16, 64]),
}
TINY: dict[str, list[Any]] = {
    "size": ["tiny", "tiny2"], "methods": [1, 3], "length": [32, 64], "anchors": [4, 8], "items": [1, 2],
}  # fmt: skip


def child(settings: C.Data) -> C.Data:
    """One point: {"x", "seconds", "bytes"}."""
    import torch

    from holdfast import methods as M
    from holdfast.measure import suites

    axis, value = settings["axis"], settings["value"]
    tokenizer = C.build_tokenizer(settings["vocab"])
    suite = suites.build("in-context", suites.Ask(tokenizer, limit=value)) if axis == "items" else None
    rows = C.stream_rows(tokenizer, value if axis == "length" else settings["length"], 32)
    C.ours(C.random_llama("tiny", tokenizer), tokenizer, C.Job(rows, 2, 1))  # every library is loaded and warm
    before = C.peak_bytes()
    model = C.random_llama(value if axis == "size" else settings["base"], tokenizer)
    count, start = C.parameters(model), time.perf_counter()
    if axis == "items":
        x = measure_items(model, tokenizer, suite)
        seconds = time.perf_counter() - start
    else:
        methods = {"methods": lambda: plan_of(value), "anchors": lambda: [M.ICLAnchor(pool=value)]}.get(axis, list)()
        job = C.Job(rows, settings["steps"], 1 if axis == "length" else settings["batch"])
        block = C.ours(model, tokenizer, job, methods, run_steps=0 if axis == "anchors" else None)
        seconds = block.prepare_seconds if axis == "anchors" else statistics.mean(block.seconds)
        x = count if axis == "size" else value
    on_card = torch.cuda.is_available()
    return {
        "x": x,
        "seconds": seconds,
        "bytes": torch.cuda.max_memory_allocated() if on_card else C.peak_bytes() - before,
    }


def measure_items(model: Any, tokenizer: Any, suite: Any) -> int:
    from holdfast.measure.asking import score_suite

    return sum(len(t["items"]) for t in score_suite(model, tokenizer, suite)["tasks"])


def run(args: argparse.Namespace) -> None:
    """Measure the points that have no JSON yet."""
    from holdfast.files import write_json

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: getattr(args, k) for k in ("base", "steps", "batch", "length", "vocab")}
    for axis in AXES:
        for value in points(args, axis):
            path = args.out / f"{axis}.{value}.json"
            if path.exists() or args.only not in axis:
                continue
            runs = [C.in_subprocess(__file__, {**settings, "axis": axis, "value": value}) for _ in range(args.cycles)]
            point = {"axis": axis, "value": value, "x": runs[0]["x"], "settings": settings}
            point |= {k: statistics.median(r[k] for r in runs) for k in ("seconds", "bytes")}
            write_json(path, {**point, "runs": runs, "facts": C.facts()})
            print(f"  {axis} {value}: {point['seconds']:.3f} s, {point['bytes'] / 1e6:.0f} MB", flush=True)


def points(args: argparse.Namespace, axis: str) -> list[Any]:
    return args.sizes if axis == "size" and args.sizes else TINY[axis] if args.tiny else AXES[axis][2]


def read(folder: Path) -> dict[str, list[C.Data]]:
    """axis -> points, by x."""
    found: dict[str, list[C.Data]] = {}
    for path in sorted(folder.glob("*.json")):
        d = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(d["axis"], []).append(d)
    return {a: sorted(found[a], key=lambda d: d["x"]) for a in AXES if a in found}


def fits(found: list[C.Data]) -> dict[str, float | None]:
    x = [d["x"] for d in found]
    return {what: C.exponent(x, [d[what] for d in found]) for what in ("seconds", "bytes")}


def table(folder: Path) -> list[str]:
    """Markdown lines; none without data."""
    found = read(folder)
    if not found:
        return []
    lines = ["| against | points | seconds of | seconds | exponent | MB | exponent |", "|---|---|---|---|---|---|---|"]
    for axis, of in found.items():
        slope = {k: "n/a" if v is None else f"**{v:.2f}**" for k, v in fits(of).items()}
        cells = [
            AXES[axis][0],
            ", ".join(_short(d["x"]) for d in of),
            AXES[axis][1],
            ", ".join(f"{d['seconds']:.2g}" for d in of),
            slope["seconds"],
            ", ".join(f"{d['bytes'] / 1e6:.0f}" for d in of),
            slope["bytes"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *steep(found)]


WHY = {"length": "attention inside a row is quadratic", "anchors": "each prompt is one more row for the base"}


def steep(found: dict[str, list[C.Data]]) -> list[str]:
    """A line for every step between two points in which time grows worse than linearly."""
    lines = []
    for axis, of in found.items():
        for a, b in itertools.pairwise(of):
            slope = C.exponent([a["x"], b["x"]], [a["seconds"], b["seconds"]])
            if slope is not None and slope > STEEP:
                why = f": {WHY[axis]}" if axis in WHY else ""
                lines.append(
                    f"- {AXES[axis][0]}, from {_short(a['x'])} to {_short(b['x'])}: exponent {slope:.2f}{why}"
                )
    return ["", "Steps in which time grows worse than linearly:", "", *lines] if lines else []


def _short(x: float) -> str:
    return f"{x / 1e9:.2g} B" if x >= 1e9 else f"{x / 1e6:.0f} M" if x >= 1e6 else f"{x:g}"


def _ticks(axis: Any, labels: dict[float, str]) -> None:
    """Measured values only: powers of ten say little on a short axis."""
    axis.set_ticks(list(labels), list(labels.values()), fontsize=7)
    axis.set_ticks([], minor=True)


def plot(folder: Path, path: Path) -> None:
    """Time above, memory below, one column for each axis; both logarithmic, with the fitted slope."""
    found = read(folder)
    if not found:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(found), figsize=(3 * len(found), 5), squeeze=False)
    for column, (axis, of) in enumerate(found.items()):
        for panel, what, unit in ((panels[0][column], "seconds", 1), (panels[1][column], "bytes", 1e6)):
            usable, slope = [d for d in of if d[what] > 0], fits(of)[what]
            panel.loglog([d["x"] for d in usable], [d[what] / unit for d in usable], "o-")
            panel.set_title("" if slope is None else f"exponent {slope:.2f}", fontsize=9)
            panel.set_ylabel(f"seconds, {AXES[axis][1]}" if what == "seconds" else "MB", fontsize=8)
            _ticks(panel.xaxis, {d["x"]: _short(d["x"]) for d in usable[:: 2 if len(usable) > 4 else 1]})
            ends = sorted(d[what] / unit for d in usable)
            _ticks(panel.yaxis, {y: f"{y:.2g}" if y < 10 else f"{y:.0f}" for y in (*ends[:1], *ends[-1:])})
        panels[1][column].set_xlabel(AXES[axis][0], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=list(C.SIZES), help="model sizes of the size axis")
    parser.add_argument("--base", choices=list(C.SIZES), default="30M", help="model of the other axes")
    parser.add_argument("--steps", type=int, default=5, help="of a point; the first warms up")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row, except on its own axis")
    parser.add_argument("--vocab", type=int, default=2048, help="of the tokenizer")
    parser.add_argument("--cycles", type=int, default=1, help="processes for each point; their median counts")
    parser.add_argument("--only", default="", help="axes whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="few small points, for a trial")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    if not args.table:
        run(args)
        plot(args.out, args.plot)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
