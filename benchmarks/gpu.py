"""Everything about speed that needs a GPU, in one command and without a download.

    python benchmarks/gpu.py              # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --dry-run    # the same on a CPU with tiny models: seconds
    python benchmarks/gpu.py --minutes 9 --try cudnn-on,varlen,fixed,tree   # what matters, suspects one by one

Random weights in real shapes: Llama 3.2 1B and SmolLM2-135M; a byte-level tokenizer trained on the shipped texts. For
each: LoRA and full tuning by the loop of `holdfast tune` against TRL's SFTTrainer (its defaults; no checkpointing; and
padding-free, with FlashAttention where that is installed), retention overhead, memory with and without checkpointing,
share of the card's rate, and scoring against lm-evaluation-harness's HF backend on identical items. Then prompts with
many continuations on a Qwen3 0.6B, and how long a process takes to begin. Sides are warmed up and alternate; ratios of
medians. First comes one profiled step: the ten longest operators, and how long the card was idle. All is written after
each row; a row or side that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import _common as C
import gpu_tries

# dense bf16 FLOP/s in the makers' data sheets, by a part of the card's name
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "A10G": 70e12}


CONTEXT = "import torch; torch.ones(1, device='cuda' if torch.cuda.is_available() else 'cpu').item()"


@dataclass(frozen=True)
class Plan:
    """The sizes of a whole run."""

    models: tuple[str, ...] = ("smollm2-135m", "llama-1b")
    vocab: int = 4096
    tokens: tuple[int, ...] = (2048, 16384)  # of a step
    steps: int = 13
    cycles: int = 3
    items: int = 24  # of each in-context task
    batches: tuple[int, ...] = (16, 64, 256)  # of the harness
    fan: tuple[str, int, int, int, int] = (
        "qwen-0.6b",
        240,
        300,
        10,
        8,
    )  # model, prompts, tokens, continuations, tokens
    begins: tuple[str, ...] = ("pass", "import torch", CONTEXT, "import transformers", "import holdfast.verbs.tune")
    rate_rows: int = 8192
    rate_seconds: float = 1.0
    warm: bool = True  # a block of each side that does not count


DRY = Plan(("tiny",), 400, (100,), 2, 1, 1, (2,), ("tiny", 3, 20, 4, 2), ("pass",), 8, 0.01, warm=False)


def training(model: Any, tokenizer: Any, kind: str, tokens: int, plan: Plan) -> C.Data:
    """Ours against TRL, and ours with retention against ours without."""
    from holdfast.methods import ICLAnchor

    rows = C.rows_of("text", None, tokenizer)
    batch = max(1, round(tokens / statistics.mean(len(r.ids) for r in rows)))
    job = C.Job(rows, plan.steps, batch, kind)
    plain = {"gradient_checkpointing": False}
    flat = {**plain, "padding_free": True, "max_length": None}
    sides: dict[str, Callable[[], C.Block]] = {
        "ours": lambda: C.ours(C.fresh(model), tokenizer, job),
        "ours + ICLAnchor": lambda: C.ours(C.fresh(model), tokenizer, job, [ICLAnchor()]),
        "ours checkpointing": lambda: C.ours(_again(C.fresh(model)), tokenizer, job),
        "TRL defaults": lambda: C.trl(C.fresh(model), tokenizer, job),
        "TRL no checkpointing": lambda: C.trl(C.fresh(model), tokenizer, job, plain),
        "TRL padding-free": lambda: C.trl(_flash(C.fresh(model)), tokenizer, job, flat),
    }
    lost: dict[str, str] = {}
    warm = C.alternate(sides, 1, lost) if plan.warm else sides
    blocks = C.alternate({n: sides[n] for n in warm}, plan.cycles, lost)
    small = [n for n in sides if n not in blocks and n not in lost]
    found = {"out_of_memory": small, "lost": lost, **figures(blocks), "blocks": C.as_json(blocks)}
    return {"kind": kind, "batch": batch, **found}


def _again(model: Any) -> Any:
    """With gradient checkpointing, as `holdfast tune` turns it on."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _flash(model: Any) -> Any:
    """TRL advises FlashAttention for flat batches; without the package the model keeps its own attention."""
    if model.device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        model.set_attn_implementation("flash_attention_2")
    return model


def figures(blocks: dict[str, list[C.Block]]) -> C.Data:
    """Rates, memory, and ratios to "ours"; empty where ours did not fit."""
    rate = {n: C.middle(b) for n, b in blocks.items()}
    memory = {n: statistics.median(x.memory for x in b) for n, b in blocks.items() if b[0].memory is not None}
    own = blocks.get("ours")
    if not own:
        return {"rate": rate, "memory": memory, "ratio": {}, "apart": {}, "memory_ratio": {}}
    others = {n: b for n, b in blocks.items() if n != "ours"}
    return {
        "tokens_a_step": statistics.mean(own[0].tokens),
        "rate": rate,
        "memory": memory,
        "ratio": {n: rate["ours"] / rate[n] for n in others},
        "memory_ratio": {n: memory["ours"] / memory[n] for n in others if n in memory},
        "apart": {n: C.apart(own[0].loss, b[0].loss) for n, b in others.items()},
    }


def scoring(model: Any, tokenizer: Any, plan: Plan, tree: bool = False) -> C.Data | None:
    """Identical items by both scorers, in turn; None where lm-evaluation-harness is not installed.

    tree: ours once more in the CPU's way.
    """
    if not importlib.util.find_spec("lm_eval"):
        return None
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from holdfast.measure.probe import Ask
    from holdfast.measure.scorer import Scorer
    from holdfast.measure.suites import build

    pairs = [(p.context, p.answers[0]) for p in build("in-context", Ask(tokenizer, limit=plan.items)).probes]
    asked = [Instance("loglikelihood", {}, p, n) for n, p in enumerate(pairs)]

    def theirs(batch: int, requests: list[Any]) -> list[Any]:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch).loglikelihood(requests, disable_tqdm=True)

    tries = {n: timed(lambda n=n: theirs(n, asked[: 4 * n]))[0] / len(asked[: 4 * n]) for n in plan.batches}
    best = min(tries, key=lambda n: tries[n])
    sides: dict[str, Callable[[], list[Any]]] = {
        "ours": lambda: Scorer(model, tokenizer, _lines=True).score(pairs),  # what CUDA takes by itself
        "harness": lambda: theirs(best, asked),
        "ours, tokens alone": lambda: Scorer(model, tokenizer).encode_all(pairs),
        **({"ours, tree": lambda: Scorer(model, tokenizer, _lines=False).score(pairs)} if tree else {}),
    }
    took: dict[str, list[float]] = {n: [] for n in sides}
    found: dict[str, list[Any]] = {}
    for _ in range(plan.cycles):
        for name, side in sides.items():
            seconds, found[name] = timed(side)
            took[name].append(seconds)
    own, other = found["ours"], found["harness"]
    middle = {n: statistics.median(s) for n, s in took.items()}
    return {
        "items": len(pairs),
        "items_per_second": {n: len(pairs) / s for n, s in middle.items()},
        "ratio": middle["harness"] / middle["ours"],
        "harness_batch_size": best,
        "equal": sum(a.greedy == bool(b[1]) for a, b in zip(own, other, strict=True)),
        "most_apart": max(abs(a.logprob - b[0]) for a, b in zip(own, other, strict=True)),  # natural-log units
        "seconds": took,
    }


def fanned(plan: Plan) -> C.Data:
    """Long prompts with many continuations each: items a second, medians after a first time that does not count."""
    from holdfast.measure.scorer import Scorer

    size, prompts, length, num, tail = plan.fan
    tokenizer = C.build_tokenizer(plan.vocab)
    model = C.random_llama(size, tokenizer)
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, len(tokenizer), (n,), generator=draw).tolist()  # noqa: E731
    encoded = [(prompt + ids(tail), length) for prompt in (ids(length) for _ in range(prompts)) for _ in range(num)]
    scorer = Scorer(model, tokenizer, _lines=True)
    with torch.inference_mode():
        first, *took = [timed(lambda: scorer.score_tokens(encoded))[0] for _ in range(1 + plan.cycles)]
    rate = len(encoded) / statistics.median(took)
    return {"model": size, "prompts": prompts, "tokens": length, "continuations": num, "items": len(encoded),
            "first_seconds": first, "seconds": took, "items_per_second": rate}  # fmt: skip


def begun(plan: Plan) -> C.Data:
    """Median seconds of whole processes that do one thing and end."""
    commands = {what: [sys.executable, "-c", what] for what in plan.begins}
    runs = {
        what: [timed(lambda c=c: subprocess.run(c, check=True))[0] for _ in range(3)] for what, c in commands.items()
    }
    return {what: statistics.median(seconds) for what, seconds in runs.items()}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, answer) of work whose answer is on the CPU, so that nothing is still running."""
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def measure(plan: Plan, minutes: float, keep: Callable[[C.Data], None], tree: bool = False) -> C.Data:
    """Small steps first, then scoring, then large steps; `keep` gets all there is after each.

    minutes: nothing is begun after them; what was left out is named, and so is what failed. tree: score in the CPU's
    way too.
    """
    tokenizer, start = C.build_tokenizer(plan.vocab), time.perf_counter()
    models: dict[str, C.Data] = {}
    out: C.Data = {"models": [], "left_out": [], "failed": [], "facts": C.facts()}
    kinds, large_first = ("lora", "full"), plan.models[::-1]
    wanted = [(n, k, plan.tokens[0]) for n in plan.models for k in kinds]
    wanted += [*((n, "scoring", 0) for n in large_first), (plan.fan[0], "continuations", 0)]
    wanted += [(n, k, t) for t in plan.tokens[1:] for n in large_first for k in kinds]
    wanted += [("a process", "begins", 0)]
    for name, kind, tokens in wanted:
        if time.perf_counter() - start > 60 * minutes:
            out["left_out"].append([name, kind, tokens])
            continue
        print(f"{name}, {kind}, {tokens} tokens", flush=True)
        try:
            if kind in ("continuations", "begins"):
                out[kind] = fanned(plan) if kind == "continuations" else begun(plan)
            else:
                _row_of(models, name, kind, tokens, tokenizer, plan, tree)
        except Exception as error:  # the rows behind it are wanted too
            out["failed"].append([name, kind, tokens, C.said(error)])
            print(f"  failed: {out['failed'][-1][-1]}", flush=True)
        out["models"] = list(models.values())
        keep(out)
        C.tidy()
    return out


def _row_of(
    models: dict[str, C.Data], name: str, kind: str, tokens: int, tokenizer: Any, plan: Plan, tree: bool
) -> None:
    model = C.random_llama(name, tokenizer)
    entry = models.setdefault(name, _entry(name, model))
    if kind == "scoring":
        with torch.inference_mode():
            entry["scoring"] = scoring(model, tokenizer, plan, tree)
    else:
        _train_row(entry, model, tokenizer, kind, tokens, plan)


def _entry(name: str, model: Any) -> C.Data:
    size = C.parameters(model)
    return {"name": name, "parameters": size, "dtype": str(model.dtype), "training": [], "scoring": None}


def _train_row(entry: C.Data, model: Any, tokenizer: Any, kind: str, tokens: int, plan: Plan) -> None:
    before = C.matmul_rate(model, plan.rate_rows, plan.rate_seconds)
    row = training(model, tokenizer, kind, tokens, plan)
    entry["matmul_flops"] = (before + C.matmul_rate(model, plan.rate_rows, plan.rate_seconds)) / 2
    row["share"] = {n: C.share(v, entry["parameters"], entry["matmul_flops"]) for n, v in row["rate"].items()}
    entry["training"].append(row)


def table(path: Path) -> list[str]:
    """Markdown lines; none without data."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    card = d["facts"]["card"]
    peak = next((v for n, v in PEAKS.items() if card and n in card), None)
    lines = [
        "| model | tuning | tokens a step | ours, tokens/s | times TRL's defaults | times TRL's best | its best "
        "| retention costs | memory GB: ours (TRL's best) | loss apart | share of matmul rate, of the card's peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(m, r, peak) for m in d["models"] for r in m["training"]]
    lines += ["", *(_scored(m["name"], m["scoring"]) for m in d["models"] if m["scoring"])]
    if fan := d.get("continuations"):
        what = f"{fan['prompts']} prompts of {fan['tokens']} tokens with {fan['continuations']} continuations each"
        lines.append(f"{fan['model']}, {what}: **{fan['items_per_second']:.0f}** items/s.")
    lines += [f"A process that does `{what}`: {s:.1f} s." for what, s in d.get("begins", {}).items()]
    lost = [(m["name"], r["kind"], *side) for m in d["models"] for r in m["training"] for side in r["lost"].items()]
    lines += [f"Failed: {', '.join(map(str, what))}." for what in (*lost, *d.get("failed", ()))]
    return lines


def _row(m: C.Data, r: C.Data, peak: float | None) -> str:
    none = "out of memory"
    rate = r["rate"].get("ours")
    shares = [r["share"]["ours"] * f for f in (1, peak and m["matmul_flops"] / peak) if f] if rate else []
    trl = [n for n in r["ratio"] if n.startswith("TRL") and r["apart"][n] <= C.EQUAL]
    best = min(trl, key=lambda n: r["ratio"][n], default=None)
    memory = [f"{r['memory'][n] / 1e9:.1f}" for n in ("ours", best) if n in r["memory"]]
    cells = [
        m["name"],
        r["kind"],
        f"{r['tokens_a_step']:.0f}" if rate else "",
        f"{rate:.0f}" if rate else none,
        f"**{r['ratio']['TRL defaults']:.2f}**" if "TRL defaults" in r["ratio"] else none,
        f"**{r['ratio'][best]:.2f}**" if best else none,
        best.removeprefix("TRL ") if best else "",
        f"{100 * (r['ratio']['ours + ICLAnchor'] - 1):.0f} %" if "ours + ICLAnchor" in r["ratio"] else none,
        " (".join(memory) + ")" * (len(memory) - 1),
        f"{100 * r['apart'][best]:.2f} %" if best else "",
        ", ".join(f"{100 * x:.0f} %" for x in shares),
    ]
    return f"| {' | '.join(cells)} |"


def _scored(name: str, s: C.Data) -> str:
    rate = s["items_per_second"]
    further = "".join(f" {n}: {rate[n]:.0f} items/s." for n in rate if n.startswith("ours,"))
    return (
        f"Scoring, {name}: {rate['ours']:.0f} items/s, lm-evaluation-harness {rate['harness']:.0f} (batch size "
        f"{s['harness_batch_size']}), **{s['ratio']:.1f}** times; {s['equal']} of {s['items']} greedy flags equal."
        f"{further}"
    )


def main(argv: list[str] | None = None) -> None:
    from holdfast.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on whatever there is; needs no GPU")
    parser.add_argument("--models", nargs="*", choices=list(C.SIZES), help="shapes to build instead of both")
    parser.add_argument("--steps", type=int, help="of a block; the first warms up")
    parser.add_argument("--cycles", type=int)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after them")
    known = f"ours alone, as it is and with one thing changed: {', '.join(gpu_tries.TRIES)}; tree: scoring as on a CPU"
    parser.add_argument("--try", dest="tries", type=lambda s: s.split(","), default=[], metavar="NAME,...", help=known)
    parser.add_argument("--out", type=Path, help="default: results/gpu.json; a dry run writes only where told")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("No CUDA device here. Try --dry-run, which runs the same on a CPU with tiny models.")
    given = {k: v for k in ("models", "steps", "cycles") if (v := getattr(args, k))}
    plan = Plan(**{**vars(DRY if args.dry_run else Plan()), **given})
    out = args.out or (None if args.dry_run else C.RESULTS / "gpu.json")
    begun = time.perf_counter()
    extra: C.Data = {"dry_run": args.dry_run}

    def keep(found: C.Data) -> None:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, {**found, **extra})

    extra["tries"] = gpu_tries.tries(plan, [t for t in args.tries if t != "tree"])
    keep(none := {"models": [], "facts": C.facts()})
    try:
        extra["profile"] = gpu_tries.profiled(plan)
    except Exception as error:
        extra["profile"] = {"error": C.said(error)}
    keep(none)
    keep(measure(plan, args.minutes - (time.perf_counter() - begun) / 60, keep, "tree" in args.tries))
    if out:
        print("\n".join(table(out)))


if __name__ == "__main__":
    main()
