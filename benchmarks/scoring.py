"""How fast the default in-context suite is measured, against the floor of its matrix products.

    python benchmarks/scoring.py          # writes benchmarks/results/scoring.json

floor = unique tokens * 2 * parameters in matrix products / measured matmul rate. The rate is that of the model's own
largest layer at 512 rows, in the model's dtype, measured right before and after in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from _common import matmul_rate

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    from holdfast import models
    from holdfast.measure.suites import measure_suite

    model, tokenizer = models.load(args.model)
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    took, ratio, got = [], [], {}
    with torch.inference_mode():
        for _ in range(args.repeats):
            rate = matmul_rate(model)
            start = time.perf_counter()
            got = measure_suite("in-context", lambda: model, tokenizer)
            took.append(time.perf_counter() - start)
            rate = (rate + matmul_rate(model)) / 2
            ratio.append(took[-1] / (got["num_unique_tokens"] * 2 * parameters / rate))
            print(f"{took[-1]:.1f} s, {ratio[-1]:.2f} times the floor at {rate / 1e9:.0f} GFLOP/s", flush=True)
    items = sum(len(t["items"]) for t in got["tasks"])
    out = {
        "seconds": statistics.median(took),
        "times_the_floor": statistics.median(ratio),
        "items": items,
        "unique_tokens": got["num_unique_tokens"],
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "dtype": str(model.dtype),
        "torch": torch.__version__,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "scoring.json").write_text(json.dumps(out, indent=1), encoding="utf-8")
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
