"""Peak memory of LoRA tuning: TRL's SFTTrainer, ours, and ours with the default retention, each in its own process.

    python benchmarks/memory.py           # writes benchmarks/results/memory.json

On a CPU the peak is that of the whole process (interpreter, libraries and model loading included), on a GPU that of
the allocated CUDA memory. TRL's defaults recompute layers in the backward; without checkpointing it does the same work
as ours, so both are measured. Ratios of medians; the sides alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import _common as C

SIDES = {
    "TRL defaults": {"host": "trl"},
    "TRL, no checkpointing": {"host": "trl", "gradient_checkpointing": False},
    "ours": {"host": "ours"},
    "ours + ICLAnchor": {"host": "ours", "anchor": True},
}


def child(settings: C.Data) -> C.Data:
    """One side, in a process of its own."""
    shared = Path(settings["shared"]) if settings["shared"] else None
    model, tokenizer = C.load(settings["model"])
    job = C.Job(C.rows_of(settings["data"], shared, tokenizer), settings["steps"], settings["batch"])
    loaded, options = C.peak_bytes(), dict(settings["side"])
    if options.pop("host") == "trl":
        block = C.trl(model, tokenizer, job, options)
    else:
        from holdfast.methods import ICLAnchor

        block = C.ours(model, tokenizer, job, [ICLAnchor()] if options.get("anchor") else [])
    peak = C.peak_bytes() if block.memory is None else block.memory
    return {
        "peak_bytes": peak,
        "loaded_bytes": loaded,
        "loss": block.loss,
        "parameters": C.parameters(model),
        "tokens_a_step": statistics.mean(block.tokens),
        "dtype": str(model.dtype),
    }


def figures(found: dict[str, list[C.Data]]) -> C.Data:
    middle = {n: statistics.median(r["peak_bytes"] for r in runs) for n, runs in found.items()}
    peers = [n for n in SIDES if SIDES[n]["host"] == "trl"]
    loss = {n: runs[0]["loss"] for n, runs in found.items()}
    return {
        "peak_bytes": middle,
        "ratio": {n: {p: middle[n] / middle[p] for p in peers} for n in SIDES if n not in peers},
        "apart": {n: C.apart(loss["ours"], loss[n]) for n in peers},
    }


def table(path: Path) -> list[str]:
    """Markdown lines; none without data."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    peers = list(next(iter(d["ratio"].values())))
    lines = [f"| LoRA | peak MB | {' | '.join(f'times {p}' for p in peers)} |", "|---|---|" + "---|" * len(peers)]
    for name, peak in d["peak_bytes"].items():
        cells = [f"**{d['ratio'][name][p]:.2f}**" if name in d["ratio"] else "" for p in peers]
        lines.append(f"| {name} | {peak / 1e6:.0f} | {' | '.join(cells)} |")
    where = "CUDA memory" if d["facts"]["card"] else "whole process"
    first = next(iter(d["runs"].values()))[0]
    lines += [
        "",
        f"{d['settings']['model']}, {first['tokens_a_step']:.0f} tokens a step ({d['settings']['batch']} rows of "
        f"{d['settings']['data']}), {where}. Loss curves differ by {100 * max(d['apart'].values()):.2f} %.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="or random:<size>")
    parser.add_argument("--data", choices=C.DATA, default="medium")
    parser.add_argument("--shared", default=None, help="a folder with text/sst2 and text/agnews")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--out", type=Path, default=C.RESULTS / "memory.json")
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    if not args.table and not args.out.exists():
        measure(args)
    print("\n".join(table(args.out)))


def measure(args: argparse.Namespace) -> None:
    from holdfast.files import write_json

    settings = {k: getattr(args, k) for k in ("model", "data", "shared", "steps", "batch")}
    found: dict[str, list[C.Data]] = {n: [] for n in SIDES}
    for cycle in range(args.cycles):
        for name, side in SIDES.items():
            found[name].append(C.in_subprocess(__file__, {**settings, "side": side}))
            print(f"  {cycle} {name}: {found[name][-1]['peak_bytes'] / 1e6:.0f} MB", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"settings": settings, **figures(found), "runs": found, "facts": C.facts()})


if __name__ == "__main__":
    main()
