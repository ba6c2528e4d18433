"""Memory of each process while a plan is prepared and trained on a base that FSDP2 cuts over two of them.

    python benchmarks/cut_base.py           # writes benchmarks/results/cut_base.json

No GPU is needed: a random Llama is written to safetensors and two processes over gloo tune it by LoRA with ICLAnchor,
as accelerate would on two GPUs. What a process holds of its own stands for the memory of its device: blocks that pass
through a device are copied here too, while weights that lie on the host are pages of the file, which processes share.
"passing" is what `with_plan` does; in "whole" every process first takes all of the base, as it did before. Each side
runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

import _common as C

SIDES = ("passing", "whole")
SHAPES = {"tiny": C.shape(64, 3, 400, head=8), "200M": C.shape(1024, 16, 2048)}


def held(what: str = "RssAnon") -> int:
    """Bytes of this process now: RssAnon is its own, RssFile pages of files, which others may share."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what + ":"))


class Peak:
    """The most that is held in a stretch of work, above what was held when this was made."""

    def __init__(self) -> None:
        self.before, self.most, self.found = held(), 0, dict[str, int]()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, held())
            threading.Event().wait(0.002)

    def end(self, name: str) -> None:
        self.found[name], self.most = max(self.most, held()) - self.before, 0


def child(folder: Path, side: str, steps: int) -> None:
    """One process of one side; it writes what it found."""
    from accelerate import DistributedType, PartialState
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
    )

    from holdfast import Plan, with_plan
    from holdfast import methods as M
    from holdfast.engine import processes

    torch.set_num_threads(1)
    processes.start()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = [C.columns(r) for r in C.rows_of("medium", None, tokenizer)[: 4 * steps]]
    args = TrainingArguments(
        str(folder / "out"), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, bf16=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        fsdp=True, fsdp_config={"version": 2},
    )  # fmt: skip
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate offers FSDP to GPUs only
    peak = Peak()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    peak.end("load")
    if side == "whole":
        for p in model.parameters():
            p.data = p.data.clone()
    trainer = with_plan(Trainer)(
        model=model, args=args, train_dataset=Dataset.from_list(rows), plan=Plan([M.LoRA(), M.ICLAnchor(pool=8)]),
        processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    del model
    peak.end("prepare")
    trainer.train()
    peak.end("train")
    weights = [p.to_local() for p in trainer.model.parameters() if hasattr(p, "to_local")]
    found = {**peak.found, "shard": sum(w.numel() * w.element_size() for w in weights), "file": held("RssFile")}
    losses = [h["train_loss"] for h in trainer.state.log_history if "train_loss" in h]
    (folder / f"{side}.{processes.world()[0]}.json").write_text(json.dumps({**found, "loss": losses}))


def measure(size: str, steps: int) -> C.Data:
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = C.build_tokenizer(SHAPES[size]["vocab_size"])
    config = LlamaConfig(**SHAPES[size], eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        base = sum(p.numel() * p.element_size() for p in model.parameters())
        del model
        found: C.Data = {"base": base, "size": size, "steps": steps, "sides": {}}
        for side in SIDES:
            _start(folder, side, steps)
            found["sides"][side] = [json.loads((folder / f"{side}.{rank}.json").read_text()) for rank in range(2)]
            print(side, found["sides"][side], flush=True)
    return {**found, "facts": C.facts()}


def _start(folder: Path, side: str, steps: int) -> None:
    """Two processes of this script, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--child",
        side,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
    ]
    jobs = [subprocess.Popen(command, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
    if any([job.wait() for job in jobs]):
        raise SystemExit(f"A process of {side!r} failed.")


def table(path: Path) -> list[str]:
    """Markdown lines; none without data. Sizes are in parts of the base."""
    if not path.is_file():
        return []
    d = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| base | process | while loading | while preparing | while training |",
        "|---|---|---|---|---|",
    ]
    for side, processes in d["sides"].items():
        for rank, p in enumerate(processes):
            cells = " | ".join(f"{p[what] / d['base']:.2f}" for what in ("load", "prepare", "train"))
            lines.append(f"| {side} | {rank} | {cells} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="200M", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=C.RESULTS / "cut_base.json")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args: Any = parser.parse_args(argv)
    if args.child:
        child(args.folder, args.child, args.steps)
        return
    found = measure(args.size, args.steps)
    C.keep(args.out, found)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
