"""Seconds until something happens: `holdfast --help`, and the second loading of a model, each in fresh processes.

    python benchmarks/startup.py          # writes benchmarks/results/startup.json

"Second" means that the model was converted or downloaded before. A load is split into the imports of torch and of
transformers with the model's own classes, which every program pays that loads this model, and what comes after them.
CPU seconds of the process stand beside the wall clock: they change less when the machine has other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# nothing heavy up here, _common neither: the child below measures what importing it costs
PARTS = ("import torch", "import transformers", "resolve", "load")
Data = dict[str, Any]
Lap = tuple[float, float]  # (wall, CPU) seconds


def child(settings: Data) -> dict[str, Lap]:
    """The parts of one load, in this fresh process."""
    laps = [now()]
    import torch  # noqa: F401

    laps.append(now())
    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast", *settings["classes"]):
        getattr(transformers, name)  # transformers imports a class's module on the first touch
    laps.append(now())
    from holdfast import models

    source = models.resolve(settings["model"])
    laps.append(now())
    models.load(source)
    laps.append(now())
    return {part: (laps[n + 1][0] - laps[n][0], laps[n + 1][1] - laps[n][1]) for n, part in enumerate(PARTS)}


def now() -> Lap:
    return time.perf_counter(), time.process_time()


def asked_for_help() -> Lap:
    """(wall, CPU) seconds of `holdfast --help`, from the start of the process to its end."""
    import resource

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, start = cpu(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "holdfast.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, cpu() - before


def measure(model: str, times: int) -> Data:
    import _common as C
    from holdfast import models

    config = models.read_config(models.resolve(model))  # converts or downloads, so that every timed load is a second
    settings = {"model": model, "classes": config.architectures}
    helps, loads = [], []
    for n in range(times):
        helps.append(asked_for_help())
        loads.append(C.in_subprocess(__file__, settings))
        print(f"  {n} help {helps[-1][0]:.2f} s, {', '.join(f'{p} {s[0]:.2f}' for p, s in loads[-1].items())}")
    seconds = {"help": middle(helps), **{p: middle([one[p] for one in loads]) for p in PARTS}}
    return {"model": model, "times": times, "seconds": seconds, "helps": helps, "loads": loads, "facts": C.facts()}


def middle(laps: list[Any]) -> Lap:
    return statistics.median(w for w, _ in laps), statistics.median(c for _, c in laps)


def table(path: Path) -> list[str]:
    """Markdown lines; none without data."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    rows = {"`holdfast --help`, whole process": d["seconds"]["help"]}
    for part in PARTS:
        ours = {"resolve": f"find {d['model']}", "load": f"load {d['model']}, second time"}
        rows[ours.get(part, f"`{part}`")] = d["seconds"][part]
    lines = ["| | seconds | CPU seconds |", "|---|---|---|"]
    lines += [f"| {name} | {wall:.2f} | {cpu:.2f} |" for name, (wall, cpu) in rows.items()]
    note = f"Medians over {d['times']} fresh processes. `import transformers` includes the model's own classes."
    return [*lines, "", note]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    from holdfast.files import write_json

    found = measure(args.model, args.times)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, found)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
