"""Speed and memory, against lm-evaluation-harness and the arithmetic."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruler_sections.harness import datasets_in
from ruler_sections.lab import HERE, Data, Lab, suite_of
from ruler_sections.tuned import noised

BATCHES = (1, 4, 8, 16, 32)
CHILD = """
import json, sys, time
start = time.perf_counter()
import peft, torch, transformers
from holdfast.verbs.check import check
benchmarks, base, tuned, settings = sys.argv[1:]
sys.path.insert(0, benchmarks)
from _common import peak_bytes
empty = peak_bytes()
report = check(base, tuned, **json.loads(settings))
took, status = time.perf_counter() - start, report["verdict"]["status"]
print(json.dumps({"seconds": took, "empty_bytes": empty, "peak_bytes": peak_bytes(), "status": status}))
"""


def speed(lab: Lab) -> Data:
    """The same items by our scorer and by the harness's HF backend at its best batch size; then whole checks."""
    from lm_eval.models.huggingface import HFLM

    import scoring
    from holdfast.measure.scorer import Scorer

    model, tokenizer = lab.load()
    requests, few = (_instances(tokenizer, n, lab.size(8, 1)) for n in (lab.size(48, 2), lab.size(6, 1)))
    tries = {}
    for size in lab.size(BATCHES, (1, 4)):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        tries[size] = timed(lambda lm=lm: lm.loglikelihood(few, disable_tqdm=True))[0]
    best = min(tries, key=lambda n: tries[n])
    hflm, scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=best), Scorer(model, tokenizer)
    own, other, floors = [], [], []
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    ours, theirs = [], []
    for _ in range(lab.size(3, 1)):  # in turn, since a machine's speed moves
        before = scoring.matmul_rate(model, seconds=lab.size(1.0, 0.05))
        took, ours = timed(lambda: scorer.score([r.args for r in requests]))
        rate = (before + scoring.matmul_rate(model, seconds=lab.size(1.0, 0.05))) / 2
        own.append(took)
        floors.append({"flops": rate, "times": took * rate / (2 * parameters * scorer.num_unique_tokens)})
        took, theirs = timed(lambda: hflm.loglikelihood(requests, disable_tqdm=True))
        other.append(took)
    floor = sorted(floors, key=lambda f: f["times"])[len(floors) // 2]
    out = {
        "items": len(requests),
        "dtype": str(model.dtype),
        "seconds": statistics.median(own),
        "harness_seconds": statistics.median(other),
        "each": {"seconds": own, "harness_seconds": other, "floors": floors},
        "harness_batch_size": best,
        "harness_tries": tries,
        "harness_tries_items": len(few),
        "times_faster": statistics.median(other) / statistics.median(own),
        "equal": sum(a.greedy == b for a, (_, b) in zip(ours, theirs, strict=True)),
        "unique_tokens": scorer.num_unique_tokens,
        "all_tokens": sum(len(scorer.encode(r.args)[0]) - 1 for r in requests),
        "parameters": parameters,
        "matmul_flops": floor["flops"],
        "times_the_floor": floor["times"],
    }
    return out | {"check": _checks(lab, model, tokenizer)}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def _instances(tokenizer: Any, limit: int, shots: int) -> list[Any]:
    """The in-context suite as the harness's own requests, made by its task classes from our export."""
    from lm_eval.tasks import TaskManager

    from holdfast.measure.export import export_suite

    suite = suite_of("in-context", tokenizer, limit, shots)
    with tempfile.TemporaryDirectory() as folder, datasets_in(folder):
        paths = [str(Path(folder) / f"{made.task}.yaml") for made in export_suite(suite, folder)]
        tasks = TaskManager(include_defaults=False).load(paths)["tasks"]
        for task in tasks.values():
            task.build_all_requests(rank=0, world_size=1)
        found = [i for task in tasks.values() for i in task.instances]
    asked = sorted((p.context, p.answers[0]) for p in suite.probes)
    assert sorted(i.args for i in found) == asked, "the export changed a text"
    return found


def _checks(lab: Lab, model: Any, tokenizer: Any) -> Data:
    """`check` of two models nobody has measured before, twice, each in a process of its own."""
    from holdfast import models

    size = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    settings = lab.size({}, {"limit": 2, "num_fewshot": 1, "suites": ["in-context"]})
    with tempfile.TemporaryDirectory() as folder:
        master, now = [p.detach().float() for p in model.parameters()], time.time_ns() % 2**31
        for n, name in enumerate(("base", "tuned")):
            noised(model, master, 1e-3, now + n)  # new weights, so that nothing is in the cache
            models.save_model(model, tokenizer, Path(folder) / name, card=None)
        del master
        words = [sys.executable, "-c", CHILD, str(HERE), f"{folder}/base", f"{folder}/tuned", json.dumps(settings)]
        runs = [subprocess.run(words, capture_output=True, text=True, check=False) for _ in range(2)]
    bad = next((r for r in runs if r.returncode), None)
    if bad:
        raise RuntimeError(f"check failed: {bad.stderr[-2000:]}")
    first, second = (json.loads(r.stdout.splitlines()[-1]) for r in runs)
    own = first["peak_bytes"] - first["empty_bytes"]
    return {"first": first, "second": second, "model_bytes": size, "times_the_model": own / size}
