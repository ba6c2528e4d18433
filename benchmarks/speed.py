"""Training speed of the loop of `holdfast tune` against TRL's SFTTrainer. Resumable: one JSON per cell.

    python benchmarks/speed.py --shared ../shared/data     # without --shared: the shipped data
    python benchmarks/speed.py --table

A cell is data x step size x (lora | full). First every TRL setting runs one block (packing, padding-free, smaller
micro-batches, no checkpointing; then other dtypes on the best of these); then ours, TRL's defaults and its best
setting run blocks in turn. A setting counts as the best only if its loss curve equals that of the defaults. Same
model, rows, order, learning rate and number of steps for all; every figure is a ratio of medians over blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

import _common as C

OUT = C.RESULTS / "speed"
PACKED = 0.1  # how far the mean loss of packs, which have other rows in a step, may lie from the defaults'
CELLS = {  # name -> (data, rows a step, tokens a step)
    "short": ("short", 8, None),
    "short-2048": ("short", None, 2048),
    "medium": ("medium", 8, None),
    "text-2048": ("text", None, 2048),
}


PLAIN: C.Data = {"gradient_checkpointing": False}


def layouts(batch: int, tokens: int) -> dict[str, C.Data]:
    """TRL's ways to lay out the same step, beside its defaults."""
    size = "per_device_train_batch_size"
    parts = {
        f"micro-batches of {batch // n}": {**PLAIN, size: batch // n, "gradient_accumulation_steps": n}
        for n in (2, 4)
        if batch % n == 0
    }
    return {
        "no checkpointing": PLAIN,
        "padding-free": {**PLAIN, "padding_free": True, "max_length": None},
        "packing": {**PLAIN, "packing": True, "max_length": tokens, size: 1},
        **parts,
    }


def precisions(kind: str, dtype: torch.dtype) -> dict[str, C.Data]:
    """TRL's precisions, beside ours: what trains in fp32, what is frozen in `dtype`, compute in bf16 if `dtype` is."""
    if dtype != torch.bfloat16:
        return {}
    other = torch.float32 if kind == "lora" else torch.bfloat16
    name = str(other).removeprefix("torch.")
    return {"fp32": {"bf16": False, "weights": torch.float32}, f"{name} weights": {"weights": other}}


def search(model: Any, tokenizer: Any, job: C.Job, tokens: int) -> tuple[C.Data, str, C.Data]:
    """TRL's best setting: the best layout, then the best precision of it.

    Returns: ({name: {tokens_per_second, apart} or {error}}, name of the best, its options).
    """
    defaults = C.trl(C.fresh(model), tokenizer, job)
    found: C.Data = {"defaults": {"tokens_per_second": defaults.rate(), "apart": 0.0}}
    options: dict[str, C.Data] = {"defaults": {}}

    def look(wanted: dict[str, C.Data]) -> None:
        for name, setting in wanted.items():
            options[name], found[name] = setting, tried(model, tokenizer, job, setting, defaults)
            C.tidy()
            print(f"  search {name}: {found[name]}", flush=True)

    look(layouts(job.batch, tokens))
    layout = best_of(found)
    look({f"{layout}, {n}": {**options[layout], **o} for n, o in precisions(job.kind, model.dtype).items()})
    best = best_of(found)
    return found, best, options[best]


def tried(model: Any, tokenizer: Any, job: C.Job, setting: C.Data, defaults: C.Block) -> C.Data:
    try:
        block = C.trl(C.fresh(model), tokenizer, job, setting)
    except Exception as e:  # whatever a setting cannot do here is a finding, not the end of the night
        return {"error": f"{type(e).__name__}: {e}"[:300]}
    # packs are other groups of rows, so only their mean loss can be compared
    whole = "packing" in setting
    curves = [[statistics.mean(b.loss)] if whole else b.loss for b in (defaults, block)]
    apart = C.apart(*curves)
    return {"tokens_per_second": block.rate(), "apart": apart, "equal": apart <= (PACKED if whole else C.EQUAL)}


def best_of(found: C.Data) -> str:
    """The fastest setting whose loss equals the defaults'."""
    usable = [n for n, f in found.items() if f.get("equal", n == "defaults")]
    return max(usable, key=lambda n: found[n]["tokens_per_second"])


def cell(name: str, kind: str, model: Any, tokenizer: Any, args: Any) -> C.Data:
    """Measure one cell; its figures and every block."""
    data, batch, tokens = CELLS[name]
    rows = C.rows_of(data, args.shared, tokenizer)
    mean = statistics.mean(len(r.ids) for r in rows)
    batch = batch or max(1, round(min(tokens, args.most_tokens or tokens) / mean))
    longest = max(math.ceil(mean * batch), *(len(r.ids) for r in rows))
    found, best, options = search(model, tokenizer, C.Job(rows, args.search_steps, batch, kind), longest)
    job = C.Job(rows, args.steps, batch, kind)
    sides = {
        "ours": lambda: C.ours(C.fresh(model), tokenizer, job),
        "TRL defaults": lambda: C.trl(C.fresh(model), tokenizer, job),
    }
    if options:
        sides["TRL best"] = lambda: C.trl(C.fresh(model), tokenizer, job, options)
    before = C.matmul_rate(model, seconds=args.rate_seconds)
    blocks = C.alternate(sides, args.cycles)
    flops = (before + C.matmul_rate(model, seconds=args.rate_seconds)) / 2
    return {
        "data": data,
        "cell": name,
        "kind": kind,
        "from": "shared" if args.shared else "shipped",
        "model": args.model,
        "dtype": str(model.dtype),
        "parameters": C.parameters(model),
        "batch": batch,
        "search": found,
        "best": best,
        **figures(blocks, C.parameters(model), flops, packed="packing" in options),
        "blocks": C.as_json(blocks),
    }


def figures(blocks: dict[str, list[C.Block]], num_parameters: int, flops: float, packed: bool) -> C.Data:
    """Ratios of medians, loss distances, and shares of the matmul rate."""
    own, others = blocks["ours"], {n: b for n, b in blocks.items() if n != "ours"}
    same = {n: b for n, b in others.items() if not (packed and n == "TRL best")}  # packs have other steps
    return {
        "tokens_a_step": statistics.mean(own[0].tokens),
        "trained_a_step": statistics.mean(own[0].trained),
        "rate": {n: C.middle(b) for n, b in blocks.items()},
        "rate_trained": {n: C.middle(b, "trained") for n, b in blocks.items()},
        "ratio": {n: C.middle(own) / C.middle(b) for n, b in others.items()},
        "ratio_trained": {n: C.middle(own, "trained") / C.middle(b, "trained") for n, b in others.items()},
        "apart": {n: C.apart(own[0].loss, b[0].loss) for n, b in same.items()},
        "matmul_flops": flops,
        "share": {n: C.share(C.middle(b), num_parameters, flops) for n, b in blocks.items()},
    }


def run(args: Any) -> None:
    """Measure the cells that have no JSON yet."""
    from holdfast.files import write_json

    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(n, k) for n in CELLS for k in ("lora", "full") if args.only in f"{n}.{k}"]
    todo = [(n, k) for n, k in jobs if not (args.out / f"{n}.{k}.json").exists()]
    if not todo:
        return
    model, tokenizer = C.load(args.model)
    for name, kind in todo:
        print(f"{name} {kind}", flush=True)
        write_json(args.out / f"{name}.{kind}.json", {**cell(name, kind, model, tokenizer, args), "facts": C.facts()})


def table(folder: Path) -> list[str]:
    """Markdown lines; none without data."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    if not found:
        return []
    lines = [
        "| rows | tuning | tokens a step (trained) | ours, tokens/s (trained) | times TRL's defaults "
        "| times TRL's best | its best | loss apart | share of the matmul rate: ours (TRL's best) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(CELLS)
    for d in sorted(found, key=lambda d: (order.index(d["cell"]), d["kind"])):
        top = min(d["ratio"], key=lambda n: d["ratio"][n])  # a short search may have picked a slower one
        best = d["best"] if top == "TRL best" else "defaults"
        apart = max(d["apart"].values())
        loss = f"{100 * apart:.2f} %{'' if apart <= C.EQUAL else ' (not equal)'}"
        lines.append(
            f"| {d['cell']} ({d['from']}) | {d['kind']} | {d['tokens_a_step']:.0f} ({d['trained_a_step']:.0f}) "
            f"| {d['rate']['ours']:.0f} ({d['rate_trained']['ours']:.0f}) | **{d['ratio']['TRL defaults']:.2f}** "
            f"| **{d['ratio'][top]:.2f}** | {best} | {loss} "
            f"| {100 * d['share']['ours']:.0f} % ({100 * d['share'][top]:.0f} %) |"
        )
    models = {f"{d['model']} ({d['dtype'].removeprefix('torch.')})" for d in found}
    note = (
        "What trains is in fp32 (full tuning on a CPU: masters of bf16 weights), what is frozen in the model's dtype."
    )
    return [*lines, "", f"{', '.join(sorted(models))}. {note}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="or random:<size>")
    parser.add_argument("--shared", type=Path, default=None, help="a folder with text/sst2 and text/agnews")
    parser.add_argument("--steps", type=int, default=7, help="of a block; the first warms up")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--search-steps", type=int, default=3)
    parser.add_argument("--rate-seconds", type=float, default=1.0)
    parser.add_argument("--most-tokens", type=int, default=None, help="of a step, for a small trial")
    parser.add_argument("--only", default="", help="cells whose <name>.<kind> contains this")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    args = parser.parse_args()
    if not args.table:
        run(args)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
