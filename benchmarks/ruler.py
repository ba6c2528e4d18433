"""Is the ruler straight? Measures the measuring itself. Resumable: one JSON per section in benchmarks/results/ruler/.

    python benchmarks/ruler.py run                    # measures the sections that have no JSON yet
    python benchmarks/ruler.py run --only simulated   # one of them; delete its JSON to measure it again
    python benchmarks/ruler.py page                   # writes docs/ruler.md from the JSON files

`--smoke` makes everything tiny, to see that it works; such numbers never reach the page and need their own --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from ruler_sections import harness, intervals, page, sameness, simulated, speed, tuned
from ruler_sections.lab import OUT, PAGE, RESULTS, Data, Lab
from ruler_sections.speed import timed

SECTIONS: dict[str, tuple[Callable[[Lab], Data], str, Callable[[Data], list[str]]]] = {
    "zero": (sameness.zero, "A model against itself: zero", page.page_zero),
    "harness": (harness.harness, "The same scores as lm-evaluation-harness", page.page_harness),
    "invariance": (sameness.invariance, "What must not matter", page.page_invariance),
    "simulated": (simulated.simulated, "False alarms and power, simulated", page.page_simulated),
    "intervals": (intervals.intervals, "Intervals of few items", page.page_intervals),
    "noise": (tuned.noise, "False alarms on the real model", page.page_noise),
    "damage": (tuned.damage, "Planted damage", page.page_damage),
    "seeds": (tuned.seeds, "Seeds", page.page_seeds),
    "speed": (speed.speed, "Speed and memory", page.page_speed),
}
INTRO = """# Is the ruler straight?

Checks of the measuring itself, on SmolLM2-135M-Instruct. Produced by `benchmarks/ruler.py`; do not edit by hand.
"""


def run(lab: Lab, out: Path, only: str | None = None) -> None:
    """Measure the sections that have no JSON yet."""
    import torch

    from holdfast.files import write_json
    from holdfast.versions import versions

    out.mkdir(parents=True, exist_ok=True)
    for name in [only] if only else SECTIONS:
        path = out / f"{name}.json"
        if path.exists():
            print(f"{name}: there already ({path})", flush=True)
            continue
        seconds, data = timed(lambda name=name: SECTIONS[name][0](lab))
        where = {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
        where |= {"threads": torch.get_num_threads(), "accelerator": torch.cuda.is_available()}
        head = {"section": name, "model": lab.model, "smoke": lab.smoke, "seconds": seconds}
        write_json(path, {**head, "hardware": where, "versions": versions(), "data": data})
        print(f"{name}: {seconds:.0f} s", flush=True)


def written(out: Path) -> str:
    """docs/ruler.md: measured lines only."""
    text = [INTRO]
    for name, (_, title, lines) in SECTIONS.items():
        path = out / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"smoke": True}
        text += [f"## {title}", ""]
        if found["smoke"]:
            text += ["Not measured yet.", ""]
            continue
        h, v = found["hardware"], found["versions"]
        where = f"{h['system']} {h['machine']}, {h['threads']} of {h['cores']} cores, torch {v['torch']}"
        lib = f"transformers {v['transformers']}" + (
            f", lm_eval {v['lm_eval']}" if name in ("harness", "speed") else ""
        )
        text += [*lines(found["data"]), "", f"Measured in {found['seconds']:.0f} s: {where}, {lib}.", ""]
    return "\n".join(text)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--only", choices=tuple(SECTIONS))
    parser.add_argument("--model", default=Lab.model, help="an alias, hub id or folder")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the JSON files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells of leaderboard.py")
    args = parser.parse_args(words)
    if args.smoke and (args.out is None or args.out.resolve() == OUT.resolve()):
        parser.error("--smoke needs its own --out folder: its numbers mean nothing")
    if args.what == "page":
        from holdfast.files import write_text

        write_text(PAGE, written(args.out or OUT))
        return
    run(Lab(args.model, args.smoke, args.results), args.out or OUT, args.only)


if __name__ == "__main__":
    main()
