"""Merging on the disk against copying the files: time and peak memory, on a model made on the spot.

    python benchmarks/merge_stream.py           # writes benchmarks/results/merge_stream.json

A base and a tuned model of random weights in bfloat16 lie in a temporary folder, in several files. Each cycle copies
the tuned model's files and, in a process of its own, writes a merge of the two (WiSE-FT). Before each of them all that
is waiting is written to the disk, so that neither waits for the other; both read what the system holds in memory.
`share` is the time of copying over that of merging, though merging reads two models. `cpu_seconds` are those of all
threads and of the kernel for them. The look at whether the two are relatives, which comes once before, is timed apart.
Memory (Linux): what the process holds more at the peak of the merge than before it, over the bytes of the largest
tensor in both models and in the result.

`peer` is mergekit (test extra) on the same merge, in the same cycle and in a process of its own, with its lazy reading
of tensors; loading either program is not timed. `against_peer` is its time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

import _common as C

LAYERS_A_FILE = 4


def make(folder: Path, gigabytes: float, seed: int, base: Path | None) -> None:
    """A Llama of random weights, or the one in `base` with every weight a little elsewhere."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    width, settings = 2048, C.shape(2048, 1, 32_768)
    layer = 4 * width * width + 3 * width * settings["intermediate_size"]
    settings["num_hidden_layers"] = max(1, round((gigabytes * 5e8 - width * 32_768) / layer))
    config = LlamaConfig(**settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir()
    config.save_pretrained(folder)
    C.build_tokenizer().save_pretrained(folder)
    names = [n for n, _ in model.named_parameters()]
    files = {n: f"model-{_file(n):05}.safetensors" for n in names}
    shapes, dice = dict(model.named_parameters()), torch.Generator().manual_seed(seed)
    for file in sorted(set(files.values())):
        old = load_file(base / file) if base else {}
        new = {n: torch.randn(shapes[n].shape, generator=dice) * 0.02 for n in names if files[n] == file}
        moved = {n: (old[n] + 0.05 * t if old else t).bfloat16() for n, t in new.items()}
        save_file(moved, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _file(name: str) -> int:
    from holdfast.method import layer_of

    return 1 + (layer_of(name) or 0) // LAYERS_A_FILE


def child(settings: C.Data) -> C.Data:
    """One merge, in a process of its own."""
    from holdfast.methods import WiSEFT
    from holdfast.sites.merge_files import Pair

    start = time.perf_counter()
    pair = Pair(settings["base"], settings["tuned"])
    related = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = C.peak_bytes()
    seconds, cpu = timed(lambda: pair.write([WiSEFT(alpha=0.5)], Path(settings["out"])))
    largest = max(t.numel() for t in pair.like.parameters()) * 2
    memory = {"more_bytes": C.peak_bytes() - before, "largest": largest}
    return {"seconds": seconds, "cpu_seconds": cpu, "related_seconds": related, **memory}


def peer(settings: C.Data) -> C.Data:
    """The same merge by mergekit, in a process of its own."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration(
        merge_method="linear",
        models=[{"model": settings[n], "parameters": {"weight": 0.5}} for n in ("base", "tuned")],
        dtype="bfloat16",
    )
    options = MergeOptions(quiet=True, copy_tokenizer=False, lazy_unpickle=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = C.peak_bytes()
    seconds, cpu = timed(lambda: run_merge(config, settings["out"], options))
    return {"peer_seconds": seconds, "peer_cpu": cpu, "peer_bytes": C.peak_bytes() - before}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    os.sync()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(gigabytes: float, cycles: int, out: Path) -> C.Data:
    from holdfast.files import write_json

    runs: list[C.Data] = []
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        folder = Path(place)
        make(folder / "base", gigabytes, 0, None)
        make(folder / "tuned", gigabytes, 1, folder / "base")
        for _ in range(cycles):
            seconds, cpu = timed(lambda: shutil.copytree(folder / "tuned", folder / "copy"))
            shutil.rmtree(folder / "copy")
            paths = {n: str(folder / n) for n in ("base", "tuned", "out")}
            found = C.in_subprocess(__file__, paths)
            shutil.rmtree(folder / "out")
            found |= C.in_subprocess(__file__, {**paths, "peer": True})
            shutil.rmtree(folder / "out")
            runs.append({**found, "copy_seconds": seconds, "copy_cpu": cpu})
            ours, peers = found["seconds"], found["peer_seconds"]
            print(f"  copied in {seconds:.1f} s, merged in {ours:.1f} s, by mergekit in {peers:.1f} s", flush=True)
        size = sum(f.stat().st_size for f in (folder / "tuned").glob("*.safetensors"))
    middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    found = {
        "facts": C.facts(),
        "bytes": size,
        "share": middle["copy_seconds"] / middle["seconds"],
        "against_peer": middle["peer_seconds"] / middle["seconds"],
        "peer": f"mergekit {version('mergekit')}",
        "tensor_sets": middle["more_bytes"] / (3 * middle["largest"]),
        "runs": runs,
    }
    write_json(out, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each of the two models")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--out", type=Path, default=C.RESULTS / "merge_stream.json")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps((peer if args.child.get("peer") else child)(args.child)))
        return
    d = measure(args.gigabytes, args.cycles, args.out)
    size, share, sets = d["bytes"] / 1e9, d["share"], d["tensor_sets"]
    print(f"{size:.1f} GB: {share:.2f} of the speed of copying, {sets:.2f} tensor sets more at the peak")
    print(f"mergekit takes {d['against_peer']:.2f} times as long")


if __name__ == "__main__":
    main()
