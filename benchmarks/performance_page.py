"""Writes docs/performance.md from what the performance benchmarks measured.

    python benchmarks/performance_page.py

Sections: speed.py, memory.py, overhead.py, scoring.py, startup.py, growth.py, gpu.py, and since.py where it ran
(pages.json: its part on large pages). What has no JSON is "not measured yet".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import _common as C
import gpu
import growth
import memory
import since
import speed
import startup

NONE = ["Not measured yet."]
INTRO = """# Performance

Produced by `benchmarks/performance_page.py`; do not edit by hand. `make bench` measures what is missing.

Every figure is a ratio of medians, measured against the named peer in turn in one run: same model, rows, order,
learning rate, rows a step and number of steps. "Loss apart" is the mean distance of the two loss curves relative to
their height. Rates count the task's own tokens, no padding; "trained" are those that carry a loss. The matmul rate is
that of the model's own largest layer, measured in the same process; a share of 100 % would be 6 FLOP per parameter and
token at that rate. Absolute figures are those of the machine named below each table.
"""
COMMAND = """### Targets, and what measures them

One command on one H100 or H200, without a download. It begins nothing new after nine minutes, and names what it left
out; `--dry-run` goes the same way on a CPU with tiny models, as the long tests do.

```
python benchmarks/gpu.py --minutes 9 --try cudnn-on,varlen,fixed,pageable,tree
python benchmarks/performance_page.py
```

**None of these was measured on a GPU since the code for it was written**, unless the table above has it.
"""
PAGES = """Linux gives memory in pages of 4 KB unless a program asks for 2 MB, where
`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` (with `always` nothing need be done). On a virtual machine
small pages can cost more than the computing. With glibc 2.35 or later a variable of the environment asks for large
ones and keeps freed memory in the process. `make` sets it; on your own command line:

```
GLIBC_TUNABLES=%s holdfast tune my.yaml
```
"""
TARGETS = (
    (
        "training, 135M and 1B, LoRA and full, 2k and 16k tokens a step: TRL's best everywhere, 1.5 times it at 16k",
        'each row, "times TRL\'s best"',
    ),
    ("peak memory at most TRL's best", '"ours" against "TRL no checkpointing" and "TRL padding-free"'),
    ("the same with checkpointing", '"ours checkpointing" against "TRL defaults"'),
    ("default plan at most 15 % more time than plain tuning", '"retention costs"'),
    ("scoring, 1B, in-context suite: 5 times lm-evaluation-harness at its best batch", '"Scoring, llama-1b"'),
    ("scoring, 0.6B shape, 300-token prompts with 10 continuations each: 1,200 items/s", "`continuations`"),
    ("cold start of a process", "`begins`: interpreter, torch, first use of the card, transformers, ours"),
    ("demo in all, model cached: under 30 s", "none: `time holdfast tune holdfast:demo`, the second time"),
    ("what each suspect costs: cuDNN's plans, kernels for rows of any length, few shapes, pageable copies", "`tries`"),
    ("where a step's time goes, and how long the card is idle", "`profile`"),
)
ELSEWHERE = """In no script, as they need more than one card or ten minutes, and not run on a GPU: FSDP2 (what a CPU
shows is in [scale](scale.md)), a base in 4 bits and `adamw_bnb_8bit` (both ran on a CPU), `torch.compile` (timed on a
CPU), FlashAttention, generated text, `--invariant`: see [decisions](decisions.md).
"""


def targets() -> list[str]:
    """What each target of the GPU work waits for."""
    rows = [f"| {target} | {row} |" for target, row in TARGETS]
    return [COMMAND, "| target on one H100 or H200 | what of `gpu.py` shows it |", "|---|---|", *rows, "", ELSEWHERE]


def hardware(facts: C.Data) -> list[str]:
    """One line: where, and with which versions."""
    v, card = facts["versions"], facts["card"]
    where = f"{card}, " if card else ""
    names = ("torch", "transformers", "peft", "trl", "lm_eval")
    tools = ", ".join(f"{n} {v[n]}" for n in names if n in v)
    return ["", f"{where}{facts['cpu']}, {facts['threads']} of {facts['cores']} threads, {facts['system']}; {tools}."]


def facts_of(path: Path) -> C.Data:
    """Those of a file, or of the newest file of a folder."""
    newest = max(path.glob("*.json"), key=lambda p: p.stat().st_mtime) if path.is_dir() else path
    return json.loads(newest.read_text(encoding="utf-8"))["facts"]


def section(lines: list[str], path: Path) -> list[str]:
    return [*lines, *hardware(facts_of(path))] if lines else NONE


def overhead(path: Path) -> list[str]:
    if not path.is_file():
        return NONE
    d = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for one in d.values():  # of each task
        lines += ["| plan | time, plain tuning of the same kind = 1 |", "|---|---|"]
        lines += [*(f"| {n} | {r:.2f} |" for n, r in one["ratio"].items()), "", one["note"], ""]
    return lines[:-1]


def pages(path: Path) -> list[str]:
    """What large pages bring on a CPU."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        PAGES % since.PAGES["GLIBC_TUNABLES"],
        "| large pages, small ones = 1 | a step | its CPU seconds |",
        "|---|---|---|",
    ]
    for name, cell in d["cells"].items():
        lines.append(f"| {' | '.join([name.partition(',')[0], *since.spans(cell)])} |")
    return lines


def scoring(path: Path) -> list[str]:
    if not path.is_file():
        return NONE
    d = json.loads(path.read_text(encoding="utf-8"))
    return [
        f"The in-context suite, {d['items']} items, {d['unique_tokens']} unique tokens: {d['seconds']:.1f} s, "
        f"{d['times_the_floor']:.2f} times the floor of its matrix products.",
        "",
        f"{d['machine']}, {d['threads']} threads, torch {d['torch']}. Against lm-evaluation-harness: docs/ruler.md.",
    ]


def page(results: Path, plot: Path) -> str:
    """The whole page; `plot` is shown beside the growth table when it is there."""
    picture = ["", f"![growth]({plot.name})"] if plot.is_file() else []
    grown = growth.table(results / "growth")
    parts = {
        "Training speed": section(speed.table(results / "speed"), results / "speed"),
        "Memory": section(memory.table(results / "memory.json"), results / "memory.json"),
        "What retention costs": overhead(results / "overhead.json"),
        "Scoring": scoring(results / "scoring.json"),
        "Starting": section(startup.table(results / "startup.json"), results / "startup.json"),
        "Growth": section([*grown, *picture] if grown else [], results / "growth"),
    }
    since_then = since.table(results / "since.json")
    if since_then:
        parts["Against an earlier commit"] = section(since_then, results / "since.json")
    parts["Memory in large pages"] = section(pages(results / "pages.json"), results / "pages.json")
    parts["On a GPU"] = section(gpu.table(results / "gpu.json"), results / "gpu.json")
    sections = (line for title, lines in parts.items() for line in (f"## {title}", "", *lines, ""))
    return "\n".join([INTRO, *sections, *targets()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=C.RESULTS)
    parser.add_argument("--out", type=Path, default=C.HERE.parent / "docs" / "performance.md")
    args = parser.parse_args()
    args.out.write_text(page(args.results, args.out.parent / growth.PLOT.name), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
