"""What torch.compile of the decoder blocks is worth in our packed training step.

    python benchmarks/compiled.py           # writes benchmarks/results/compiled.json; several minutes

Regional: each block is compiled by itself (`Module.compile`), once its adapter is in place; attention of packed rows
stays outside, since its shapes are laid out in Python ("with attention" leaves it inside). Rows of all lengths, so
every step has another number of tokens. CPU seconds of one thread, compilers that were started included: wall clocks
change more when the machine has other work. Sides run in turn; `graphs` are those that dynamo made, counted after each
step: what still grows late in a run is compiled again for new shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import _common as C
import ops

SIDES: dict[str, dict[str, Any] | None] = {
    "as it is": None,
    "dynamic": {"dynamic": True, "inside": False},
    "dynamic, with attention": {"dynamic": True, "inside": True},
    "a shape at a time": {"dynamic": False, "inside": False},
}
LATE = 0.5  # the part of the steps that counts as steady


@contextmanager
def compiled(how: dict[str, Any] | None) -> Iterator[list[int]]:
    """Blocks are compiled when a stage begins; gives the number of graphs after each step."""
    from holdfast.engine import attention
    from holdfast.engine.ways import blocks
    from holdfast.session import Session

    graphs: list[int] = []
    if how is None:
        yield graphs
        return
    from torch._dynamo.utils import counters

    enter, begin, own = Session.enter, Session.begin_step, attention.packed_attention
    torch._dynamo.reset()
    counters.clear()

    def enter_compiled(self: Any, stage: Any) -> Any:
        model = enter(self, stage)
        for block in blocks(model):
            block.compile(dynamic=how["dynamic"])
        return model

    def counted(self: Any, *args: Any) -> None:
        graphs.append(counters["stats"]["unique_graphs"])
        begin(self, *args)

    Session.enter, Session.begin_step = enter_compiled, counted
    if not how["inside"]:
        attention.register(attention.ATTENTION, torch.compiler.disable(own))
    try:
        yield graphs
    finally:
        Session.enter, Session.begin_step = enter, begin
        attention.register(attention.ATTENTION, own)
        graphs.append(counters["stats"]["unique_graphs"])


def spent() -> float:
    """CPU seconds of this process and of those it started and waited for."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def side(model: Any, tokenizer: Any, job: C.Job, methods: Sequence[Any], how: dict[str, Any] | None) -> C.Data:
    start = spent()
    with compiled(how) as graphs:
        block = C.ours(C.fresh(model), tokenizer, job, methods)
    late = block.seconds[int(LATE * len(block.seconds)) :]
    steady = statistics.median(late)
    return {
        "steady_seconds": steady,
        "extra_seconds": spent() - start - steady * job.steps,
        "seconds": [round(s, 4) for s in block.seconds],
        "graphs": graphs,
        "loss": block.loss,
    }


def measure(
    size: str,
    layers: int | None,
    tokens: int,
    steps: int,
    cycles: int,
    wanted: Sequence[str],
    keep: Callable[[C.Data], None],
) -> C.Data:
    """keep: gets all there is after each block."""
    from holdfast.methods import ICLAnchor

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)
    C.Clock.stamp = lambda self, *_: self.stamps.append(spent())
    tokenizer = C.build_tokenizer(2048)
    model = C.random_llama(size, tokenizer, layers)
    rows = ops.all_lengths(tokenizer)
    batch = max(2, round(tokens / statistics.mean(len(r.ids) for r in rows)))
    job = C.Job(rows, steps, batch, "lora")
    out: C.Data = {
        "size": size,
        "layers": model.config.num_hidden_layers,
        "batch": batch,
        "plans": {},
        "facts": C.facts(),
    }
    for plan, methods in (("LoRA", []), ("default", [ICLAnchor()])):
        found = out["plans"][plan] = {name: [] for name in wanted}
        for _ in range(cycles):
            for name in wanted:
                try:
                    found[name].append(side(model, tokenizer, job, methods, SIDES[name]))
                except Exception as e:  # what cannot be compiled is a finding
                    found[name].append({"error": C.said(e)})
                print(plan, name, {k: v for k, v in found[name][-1].items() if k != "seconds"}, flush=True)
                keep(out)
    return out


def table(path: Path) -> list[str]:
    """Markdown lines; none without data."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| plan | blocks | steady step, as it is = 1 | CPU seconds beside steady steps | graphs: end |",
        "|---|---|---|---|---|",
    ]
    for plan, sides in d["plans"].items():
        base = statistics.median([b["steady_seconds"] for b in sides["as it is"]] or [1.0])
        for name, blocks in sides.items():
            good = [b for b in blocks if "error" not in b]
            if not blocks:
                continue
            if not good:
                lines.append(f"| {plan} | {name} | {blocks[0]['error']} | | |")
                continue
            steady = statistics.median(b["steady_seconds"] for b in good) / base
            extra = statistics.median(b["extra_seconds"] for b in good)
            lines.append(f"| {plan} | {name} | {steady:.2f} | {extra:.0f} | {(good[0]['graphs'] or [0])[-1]} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    C.add_shape(parser)
    parser.add_argument("--steps", type=int, default=21, help="of a block; the first is not timed")
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--out", type=Path, default=C.RESULTS / "compiled.json")
    args = parser.parse_args(argv)
    measure(args.size, args.layers, args.tokens, args.steps, args.cycles, args.sides, partial(C.keep, args.out))
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
