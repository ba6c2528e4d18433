"""Memory and time of one step with logits whole and by pieces, in turn, each in a process of its own.

python benchmarks/head_pieces.py --positions 4096 --vocabulary 49152
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent


def one(positions: int, vocabulary: int, piece: int, plan: str) -> dict[str, float]:
    """Seconds of the second step of a small Llama, and the rise of the peak memory over that after loading, in MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from holdfast import methods as M
    from holdfast.engine import head
    from holdfast.engine.counts import count_rows
    from holdfast.engine.pack import token_row
    from holdfast.plan import Plan
    from holdfast.services import Context
    from holdfast.session import Session

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=vocabulary, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    rows = [
        token_row(torch.randint(5, vocabulary, (257,), generator=draw).tolist(), 1) for _ in range(positions // 256)
    ]
    head.PIECE = piece
    methods = [M.LoRA(), M.KLToBase()] if plan == "LoRA + KLToBase" else [M.LoRA()] if plan == "LoRA" else []
    session = Session(Plan(methods), model, Context(model, None, total_steps=2), knows_rows=True)
    session.prepare(rows)
    session.enter(session.stages[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(2):
        start = time.perf_counter()
        loss, _ = session.loss(session.model, rows, count_rows(rows), step)
        loss.backward()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.positions, args.vocabulary, *json.loads(args.one))))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.blocks):
        for plan in ("full", "LoRA", "LoRA + KLToBase"):
            for name, piece in (("whole", 1 << 62), ("pieces", 1 << 26)):
                command = [sys.executable, __file__, "--positions", str(args.positions)]
                command += ["--vocabulary", str(args.vocabulary), "--one", json.dumps([piece, plan])]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault(f"{plan}, {name}", []).append(json.loads(done.stdout.splitlines()[-1]))
    table = {k: {n: round(median(r[n] for r in v), 2) for n in v[0]} for k, v in found.items()}
    facts = {"positions": args.positions, "vocabulary": args.vocabulary, "blocks": args.blocks, "medians": table}
    (HERE / "results" / "head_pieces.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
