"""What one optimizer step asks of a device, counted on a CPU: no clock, no GPU.

    python benchmarks/ops.py                    # SmolLM2-135M's shape; writes benchmarks/results/ops.json
    python benchmarks/ops.py --layers 4 --out x.json

A GPU waits for the one who sends it work when a step is many small operators, when a kernel is planned for every new
shape, and when the host asks for a number. So this counts, in a step of ours (the loop of `holdfast tune`; plain, and
the default plan) and of TRL's SFTTrainer (padded, and padding-free): operators that are not views, all dispatched
operators, distinct shapes of attention, and synchronisations, which on a CPU are the calls that would wait on a GPU
(`WAITS`). Ours is counted in the ways its attention may take: `blocks` is the CPU's, `varlen` and `fixed` are those
of CUDA, `varlen` with a stand-in for the kernel, one operator as well.

And in scoring the in-context suite, by the ways of the scorer: forwards, shapes of attention, cells that go through
the model for each token that must, and synchronisations (reads of answers too) before the last forward. `lines` is
CUDA's way.

Random weights and the shipped texts: no download. Counts are medians over all steps but the first two and the last,
after which losses are read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import _common as C
from stand_in import varlen_attn

FREE = ("aten::_unsafe_view",)  # a view that the schema does not call one
ATTENTION = ("scaled_dot_product", "varlen_attn")
# what makes a host wait for its device: numbers read, sizes that depend on values, copies that are not asked for ahead
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::equal",
         "aten::is_nonzero")  # fmt: skip
WARM = 2


@dataclass
class Step:
    """Counts of one step."""

    operators: int = 0  # that are not views
    dispatched: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    shapes: set[tuple[Any, ...]] = field(default_factory=set)  # of attention


class Count(TorchDispatchMode):
    """Counts operators from one step of an optimizer to the next, forward, backward and optimizer alike."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.now = list[Step](), Step()

    def __enter__(self) -> Count:
        self._hook = register_optimizer_step_post_hook(self.mark)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, step = func._schema.name, self.now
        step.dispatched += 1
        if not (func.is_view or name in FREE):
            step.operators += 1
            step.names[name] += 1
        if name in WAITS or (name.startswith("aten::index") and _by_mask(args)):
            step.waits[name] += 1
        if any(a in name for a in ATTENTION) and "backward" not in name:
            # a kernel of variable length reads the lengths from a tensor: nothing is planned for a shape
            step.shapes.add((name, *(() if "varlen" in name else [tuple(a.shape) for a in args[:3]])))
        return func(*args, **(kwargs or {}))

    def mark(self, *_: Any) -> None:
        self.steps.append(self.now)
        self.now = Step()

    def result(self) -> C.Data:
        """Medians over the steps after the warm ones; `names` are the most frequent operators."""
        steps = self.steps[WARM:-1]  # the last one is read
        middle = lambda what: statistics.median(getattr(s, what) for s in steps)  # noqa: E731
        waits = sum((s.waits for s in steps), Counter())
        return {
            "operators": middle("operators"),
            "dispatched": middle("dispatched"),
            "attention_shapes": len(
                set().union(*(s.shapes for s in self.steps[1:]))
            ),  # the first has the preparation too
            "waits": sum(waits.values()) / len(steps),
            "waits_by_name": {n: c / len(steps) for n, c in waits.most_common()},
            "names": dict(steps[-1].names.most_common(16)),
            "steps": len(steps),
        }


def _by_mask(args: Sequence[Any]) -> bool:
    """Whether an index is a mask: its number of hits decides the shape."""
    given = args[1] if len(args) > 1 else ()
    given = given if isinstance(given, list | tuple) else [given]
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in given)


# ---- both sides


def ours(model: Any, tokenizer: Any, job: C.Job, methods: Sequence[Any] = (), way: str = "blocks") -> C.Data:
    """A run of ours; `way` is one of `holdfast.engine.attention`, with a stand-in for the kernel of `varlen`."""
    from holdfast.engine import attention
    from holdfast.engine.forward import can_pack

    count = Count()
    with attention.only(way, varlen_attn):
        can_pack(model)  # the trial is no part of a step
    with attention.only(way, varlen_attn), count:
        C.ours(model, tokenizer, job, methods, logging_steps=job.steps)
    return count.result()


def trl(model: Any, tokenizer: Any, job: C.Job, options: C.Data) -> C.Data:
    """A run of SFTTrainer as its users have it, but for rows in order, no files and no logging."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from holdfast import methods as M
    from holdfast.services import Context

    disable_progress_bars()
    count = Count()
    C.set_weights(model, model.dtype if job.kind == "lora" else torch.float32)
    half = model.dtype == torch.bfloat16 or job.kind == "full"
    if job.kind == "lora":
        model = M.LoRA().adapt(model, Context(model, tokenizer, job.seed), {})

    with tempfile.TemporaryDirectory() as folder:
        fields: C.Data = {
            "output_dir": folder,
            "max_steps": job.steps,
            "per_device_train_batch_size": job.batch,
            "learning_rate": C.LEARNING_RATE[job.kind],
            "bf16": half,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "gradient_checkpointing": False,
            **options,
        }
        data = Dataset.from_list([C.columns(r) for r in job.drawn()])
        trainer = SFTTrainer(model=model, args=SFTConfig(**fields), train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        with count:
            trainer.train()
    return count.result()


def scored(model: Any, tokenizer: Any, items: int | None, lines: bool) -> C.Data:
    """The in-context suite by one of the scorer's ways; items: of each task."""
    from holdfast.measure.asking import ways_of
    from holdfast.measure.probe import Ask
    from holdfast.measure.scorer import Scorer, supports_lines, supports_tree
    from holdfast.measure.suites import build

    probes = build("in-context", Ask(tokenizer, limit=items)).probes
    scorer, count, cells, reads = Scorer(model, tokenizer, _lines=lines), Count(), list[tuple[int, int]](), [0]
    encoded = scorer.fit([split for _, of_answer in ways_of(probes, scorer.encoder) for split in of_answer])
    supports_tree(model), supports_lines(model)  # the trials, and that of the head, are no part of it
    scorer.score_tokens(encoded[:1])
    cpu = torch.Tensor.cpu

    def read(x: torch.Tensor, *args: Any) -> torch.Tensor:
        reads[0] += 1
        return cpu(x, *args)

    def note(_module: Any, _args: Any, inputs: C.Data) -> None:
        cells.append((inputs["input_ids"].numel(), sum(count.now.waits.values()) + reads[0]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        torch.Tensor.cpu = read
        with count:
            scorer.score_tokens(encoded)
    finally:
        torch.Tensor.cpu = cpu
        handle.remove()
    return {
        "items": len(probes),
        "tokens": scorer.num_unique_tokens,
        "forwards": len(cells),
        "attention_shapes": len(count.now.shapes),
        "cells_per_token": sum(n for n, _ in cells) / scorer.num_unique_tokens,
        "waits": cells[-1][1],
        "operators": count.now.operators,
    }


def sides(model: Any, tokenizer: Any, job: C.Job, default: Sequence[Any]) -> dict[str, Callable[[], C.Data]]:
    """Name -> a run of one kind of tuning."""
    fresh = lambda: C.fresh(model)  # noqa: E731
    own = {
        f"ours, {way}": lambda way=way: ours(fresh(), tokenizer, job, way=way) for way in ("blocks", "varlen", "fixed")
    }
    return {
        **own,
        "ours, default plan, blocks": lambda: ours(fresh(), tokenizer, job, default, way="blocks"),
        "ours, default plan, varlen": lambda: ours(fresh(), tokenizer, job, default, way="varlen"),
        "TRL, padded": lambda: trl(fresh(), tokenizer, job, {}),
        "TRL, padding-free": lambda: trl(fresh(), tokenizer, job, {"padding_free": True, "max_length": None}),
    }


def measure(size: str, layers: int | None, tokens: int, steps: int, without: Sequence[str]) -> C.Data:
    """All sides of LoRA and full tuning, but those whose names hold one of `without`."""
    from holdfast.methods import ICLAnchor

    tokenizer = C.build_tokenizer(2048)
    model = C.random_llama(size, tokenizer, layers)
    C.set_weights(model, torch.bfloat16)
    rows = all_lengths(tokenizer)
    batch = max(2, round(tokens / statistics.mean(len(r.ids) for r in rows)))
    out: C.Data = {"size": size, "layers": model.config.num_hidden_layers, "batch": batch, "rows": len(rows)}
    for kind in ("lora", "full"):
        out[kind] = {}
        for name, run in sides(model, tokenizer, C.Job(rows, steps, batch, kind), [ICLAnchor()]).items():
            if any(w in name for w in without):
                continue
            out[kind][name] = run()
            print(f"{kind:5} {name:28} {line(out[kind][name])}", flush=True)
    out["scoring"] = {}
    for name, lines in (("tree", False), ("lines", True)):
        out["scoring"][name] = scored(C.fresh(model), tokenizer, None, lines)
        print(f"scoring in {name}: {out['scoring'][name]}", flush=True)
    return {**out, "facts": C.facts()}


def all_lengths(tokenizer: Any) -> list[Any]:
    """Rows of lengths from 8 to 512, no two neighbours alike: many short ones and few long ones."""
    made = [C.stream_rows(tokenizer, n, 1)[0] for n in (8, 11, 17, 23, 37, 41, 67, 83, 127, 151, 211, 263, 389, 512)]
    return [made[3 * n % len(made)] for n in range(len(made))]


def line(found: C.Data) -> str:
    return (
        f"{found['operators']:8.0f} operators {found['dispatched']:8.0f} dispatched "
        f"{found['attention_shapes']:3} shapes {found['waits']:6.1f} waits"
    )


def table(path: Path) -> list[str]:
    """Markdown lines; none without data."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"| {d['size']}, {d['layers']} layers, {d['batch']} rows a step | operators that are not views | dispatched "
        "| shapes of attention | synchronisations a step |",
        "|---|---|---|---|---|",
    ]
    for kind in ("lora", "full"):
        for name, found in d[kind].items():
            cells = (found["operators"], found["dispatched"], found["attention_shapes"], found["waits"])
            lines.append(f"| {kind}: {name} | " + " | ".join(f"{c:,.0f}" for c in cells) + " |")
    if "scoring" in d:
        lines += [
            "",
            "| scoring | forwards | shapes of attention | cells a token | synchronisations | operators not views |",
            "|---|---|---|---|---|---|",
        ]
    for name, found in d.get("scoring", {}).items():
        cells = (found["forwards"], found["attention_shapes"], f"{found['cells_per_token']:.2f}", found["waits"])
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + f" | {found['operators']:,} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    C.add_shape(parser)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--without", nargs="*", default=[], help="parts of names of sides to leave out")
    parser.add_argument("--out", type=Path, default=C.RESULTS / "ops.json")
    args = parser.parse_args(argv)
    found = measure(args.size, args.layers, args.tokens, args.steps, args.without)
    C.keep(args.out, found)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
