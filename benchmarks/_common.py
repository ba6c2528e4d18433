"""What the performance benchmarks share: rows, models, the two training loops, medians, and facts of the machine.

Both loops train a `Job`: the same rows in the same order, with the same learning rate, from the same weights. A block
is one short run; blocks of all sides alternate in one process, and every figure is a ratio of medians over blocks.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LEARNING_RATE = {"lora": 3e-4, "full": 2e-5}
EQUAL = 0.02  # two loss curves are called equal when they differ by less, in the mean, relative to their height
MAX_LENGTH = 1024
Data = dict[str, Any]


# ---- models of random weights


def shape(width: int, layers: int, vocab: int = 8192, *, kv: int = 0, inner: int = 0, head: int = 64) -> Data:
    """Settings of a Llama with tied embeddings; `inner` defaults to 8/3 of the width, as in the paper."""
    heads = width // head
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "intermediate_size": inner or 64 * round(width / 24),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


SIZES: dict[str, Data] = {
    "tiny": shape(32, 2, 2048, kv=2, inner=64, head=8),
    "tiny2": shape(64, 3, 2048, kv=4, inner=128, head=8),
    "10M": shape(256, 10),
    "30M": shape(448, 11),
    "100M": shape(768, 13),
    "300M": shape(1024, 23),
    "1B": shape(2048, 19),
    "smollm2-135m": shape(576, 30, 49152, kv=3, inner=1536),
    "qwen-0.6b": {**shape(1024, 28, 151936, kv=8, inner=3072), "head_dim": 128},
    "llama-1b": shape(2048, 16, 128256, kv=8, inner=8192),
}


@cache
def build_tokenizer(vocab: int = 2048) -> Any:
    """A byte-level BPE trained on the shipped texts, once a process: no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([r.prompt + r.completion for r in _shipped("text") + _shipped("tickets")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )


def random_llama(size: str, tokenizer: Any, layers: int | None = None) -> Any:
    """A Llama of random weights where, and in the precision in which, `models.load` would put it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from holdfast.models import auto_place

    place, dtype = auto_place()
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    config = LlamaConfig(**{**SIZES[size], **({"num_hidden_layers": layers} if layers else {})}, **ids)
    with torch.random.fork_rng(), place:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a name known to `holdfast.models`, or of "random:<size>"."""
    if name.startswith("random:"):
        tokenizer = build_tokenizer(400 if "tiny" in name else 2048)
        return random_llama(name.removeprefix("random:"), tokenizer), tokenizer
    from holdfast import models

    return models.load(name)


def set_weights(model: Any, dtype: torch.dtype) -> None:
    """Weights only: model.to(dtype) would round buffers such as inv_freq too."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- rows

TASKS = {
    "sst2": {"prompt": "{sentence}\nLabel:", "completion": " {label}"},
    "agnews": {"prompt": "{sentence}\nTopic:", "completion": " {label}"},
}
DATA = ("short", "medium", "text")


def _shipped(what: str) -> list[Any]:
    from holdfast.data.rows import read_rows

    if what == "tickets":
        asked = {"prompt": "{text}\nQueue:", "completion": " {queue}"}
        return read_rows("holdfast:tickets/train.jsonl", **asked, base_dir=HERE)
    return read_rows("holdfast:general/text.jsonl", base_dir=HERE)


def _shared(task: str, shared: Path) -> list[Any]:
    from holdfast.data.rows import cap, read_rows

    return cap(read_rows(str(shared / f"text/{task}/train.jsonl"), **TASKS[task], base_dir=HERE), 1000, 0)


def rows_of(what: str, shared: Path | None, tokenizer: Any) -> list[Any]:
    """Token rows. short: SST-2, medium: AG News, text: every token of shipped texts and AG News.

    Without `shared`: the shortest third of the shipped tickets, all tickets, shipped texts and tickets.
    """
    from holdfast.data.tokens import tokenize

    if what == "text":
        rows = _shipped("text") + (_shared("agnews", shared)[:200] if shared else _shipped("tickets")[:200])
    elif shared:
        rows = _shared({"short": "sst2", "medium": "agnews"}[what], shared)
    else:
        rows = _shipped("tickets")
    made = [tokenize(r, tokenizer, None, all_tokens=what == "text") for r in rows]
    made = [r for r in made if len(r.ids) <= MAX_LENGTH]
    if what == "short" and not shared:
        made = sorted(made, key=lambda r: len(r.ids))[: len(made) // 3]
    return made


def stream_rows(tokenizer: Any, length: int, count: int) -> list[Any]:
    """`count` rows of exactly `length` tokens, every token a target."""
    from holdfast.engine.pack import token_row

    ids = [i for r in _shipped("text") + _shipped("tickets") for i in tokenizer.encode(r.prompt + r.completion)]
    ids *= math.ceil(length * count / len(ids))
    return [token_row(ids[n * length : (n + 1) * length], 1) for n in range(count)]


# ---- the two loops


@dataclass(frozen=True)
class Job:
    """What both sides train: `steps` steps of `batch` rows, in the order of `drawn`."""

    rows: Sequence[Any]
    steps: int
    batch: int
    kind: str = "lora"  # or "full"
    seed: int = 0

    def drawn(self) -> list[Any]:
        from holdfast.data.mix import Mix

        return list(islice(Mix(self.rows).draw(self.seed), self.steps * self.batch))


@dataclass
class Block:
    """One short run. The first step warms up: `seconds` begins with the second.

    tokens: those of the task's rows (no padding, nothing a method adds); trained: those that carry a loss.
    """

    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    prepare_seconds: float = 0.0
    memory: int | None = None  # peak bytes on the accelerator; None on a CPU

    def rate(self, what: str = "tokens") -> float:
        """Tokens, or trained tokens, per second."""
        return sum(getattr(self, what)[1:]) / sum(self.seconds)


class Clock:
    """Stamps of finished steps; waits for the accelerator, and notes its memory (other models on it left out)."""

    def __init__(self, model: Any):
        self.device, self.stamps, self.others = model.device, list[float](), 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            own = sum(p.numel() * p.element_size() for p in model.parameters())
            self.others = torch.cuda.memory_allocated(self.device) - own

    def stamp(self, *_: Any) -> None:
        sync(self.device)
        self.stamps.append(time.perf_counter())

    def close(self, block: Block) -> Block:
        block.seconds = [b - a for a, b in pairwise(self.stamps)]
        if self.device.type == "cuda":
            block.memory = torch.cuda.max_memory_allocated(self.device) - self.others
        return block


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def half(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype == torch.bfloat16 else None


def ours(
    model: Any,
    tokenizer: Any,
    job: Job,
    methods: Sequence[Any] = (),
    *,
    text: Sequence[Any] = (),
    run_steps: int | None = None,
    logging_steps: int = 1,
) -> Block:
    """Train `model` (it is used up) by the loop of `holdfast tune`; `methods` come beside what job.kind needs.

    text: the rows as text, where a method asks for them.
    run_steps: of the whole run that methods prepare for; None is the job's own, 0 unknown (they prepare everything).
    """
    from holdfast import methods as M
    from holdfast.hosts.plain import Training, train
    from holdfast.plan import Host, Plan
    from holdfast.services import Context
    from holdfast.session import Session

    clock, compute = Clock(model), model.dtype
    run_steps = job.steps if run_steps is None else run_steps
    plan = Plan([*([M.LoRA()] if job.kind == "lora" else []), *methods])
    ctx = Context(model, tokenizer, job.seed, text, total_steps=run_steps)
    plan.check(Host("benchmark"), ctx)
    session = Session(plan, model, ctx, compute_dtype=compute, knows_rows=True)
    mix, drawn = session.mix(job.rows), job.drawn()
    start = time.perf_counter()
    session.prepare(list(islice(mix.draw(job.seed), (run_steps or job.steps) * job.batch)))
    sync(model.device)
    block = Block(prepare_seconds=time.perf_counter() - start)
    settings = Training(
        job.steps, job.batch, learning_rate=LEARNING_RATE[job.kind], warmup_steps=0, seed=job.seed,
        autocast=half(compute), save_steps=0, logging_steps=logging_steps,
    )  # fmt: skip
    log = train(session, mix, settings, on_step=clock.stamp)
    block.loss = [parts["task"] for _, parts in log.loss]
    steps = [drawn[n * job.batch : (n + 1) * job.batch] for n in range(job.steps)]
    block.tokens = [sum(len(r.ids) for r in rows) for rows in steps]
    block.trained = [sum(r.num_scored for r in rows) for rows in steps]
    return clock.close(block)


def trl(model: Any, tokenizer: Any, job: Job, options: Mapping[str, Any] | None = None) -> Block:
    """Train `model` (it is used up) by TRL's SFTTrainer.

    options: SFTConfig fields that differ from TRL's defaults; "weights" is the dtype of the frozen or trained weights.
    Only what makes the run comparable is set: rows in order, steps, learning rate, no files, no logging.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig

    from holdfast import methods as M
    from holdfast.services import Context

    disable_progress_bars()
    given, clock, on_cpu = dict(options or {}), Clock(model), model.device.type == "cpu"
    compute = half(model.dtype)
    set_weights(model, given.pop("weights", model.dtype if job.kind == "lora" else torch.float32))
    if job.kind == "lora":
        model = M.LoRA().adapt(model, Context(model, tokenizer, job.seed), {})
    # no column for the attention mask: TRL builds it
    data = Dataset.from_list([columns(r) for r in job.drawn()])

    class Stamp(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            trainer.step_done()
            clock.stamp()

    with tempfile.TemporaryDirectory() as folder:
        fields: Data = {
            "output_dir": folder,
            "max_steps": job.steps,
            "per_device_train_batch_size": job.batch,
            "learning_rate": LEARNING_RATE[job.kind],
            "bf16": compute is not None,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": on_cpu,
            "dataloader_pin_memory": not on_cpu,
            **given,
        }
        trainer = _counting()(
            model=model, args=SFTConfig(**fields), train_dataset=data, processing_class=tokenizer, callbacks=[Stamp()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.close(trainer.block())


def columns(row: Any) -> Data:
    labels = [int(i) if s else -100 for i, s in zip(row.ids, row.scored, strict=True)]
    return {"input_ids": row.ids.tolist(), "labels": labels}


def _counting() -> type:
    """SFTTrainer that also keeps loss and token counts of every step, as tensors: nothing waits for the device."""
    from trl import SFTTrainer

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            counts = mask.sum(), (inputs["labels"][:, 1:] != -100).sum()
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.micro = [*getattr(self, "micro", ()), (loss, *counts)]
            return loss

        def step_done(self) -> None:
            done = [torch.stack(column).sum() for column in zip(*self.micro, strict=True)]
            self.done, self.micro = [*getattr(self, "done", ()), done], []

        def block(self) -> Block:
            loss, tokens, trained = zip(*self.done, strict=True)
            return Block(
                loss=[float(x) for x in loss], tokens=[int(x) for x in tokens], trained=[int(x) for x in trained]
            )

    return Counting


def alternate(
    sides: Mapping[str, Callable[[], Block]], cycles: int, lost: dict[str, str] | None = None
) -> dict[str, list[Block]]:
    """`cycles` blocks of every side, in turn. A side the card is too small for is left out of the answer.

    lost: what went wrong with a side, which is then left out too; None: that ends the benchmark.
    """
    out: dict[str, list[Block]] = {name: [] for name in sides}
    for cycle in range(cycles):
        for name in list(out):
            try:
                out[name].append(sides[name]())
                print(f"  {cycle} {name}: {out[name][-1].rate():.1f} tokens/s", flush=True)
            except torch.OutOfMemoryError:
                del out[name]
                print(f"  {cycle} {name}: out of memory", flush=True)
            except Exception as error:
                if lost is None:
                    raise
                del out[name]
                lost[name] = said(error)
                print(f"  {cycle} {name}: {lost[name]}", flush=True)
            tidy()
    return out


def said(error: Exception) -> str:
    """What went wrong, in a line of a results file."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fresh(model: Any) -> Any:
    """A copy to be used up by one block."""
    return copy.deepcopy(model)


# ---- figures


def middle(blocks: Sequence[Block], what: str = "tokens") -> float:
    """Median rate; every ratio is one of two such medians."""
    return statistics.median(b.rate(what) for b in blocks)


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean distance of two loss curves relative to the height of the first."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / sum(map(abs, a))


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of log y over log x by least squares; None with fewer than two usable points."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b and b > 0]
    if len({a for a, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def matmul_rate(model: Any, rows: int = 512, seconds: float = 1.0, dtype: torch.dtype | None = None) -> float:
    """FLOP/s of x @ W^T with the model's largest block matrix, in `dtype` (the matrix's own if None)."""
    weights = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    w = max(weights, key=lambda p: p.numel()).detach()
    w = w.to(dtype or w.dtype)
    x = torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device)
    for _ in range(10):
        F.linear(x, w)
    sync(w.device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10 if w.is_cuda else 1):  # a kernel of a GPU is shorter than a wait for it
            F.linear(x, w)
            count += 1
        sync(w.device)
    return 2 * rows * w.numel() * count / (time.perf_counter() - start)


def share(tokens_per_second: float, num_parameters: int, flops: float) -> float:
    """Part of the matmul rate that 6 FLOP per parameter and token are (for LoRA too, as usual, though it needs 4)."""
    return 6 * num_parameters * tokens_per_second / flops


def keep(path: Path, found: Data) -> None:
    """Write a benchmark's results, whole or not at all."""
    from holdfast.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Options of a model of random weights and of a step."""
    parser.add_argument("--size", default="smollm2-135m", choices=list(SIZES))
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--tokens", type=int, default=512, help="of a step")


def peak_bytes() -> int:
    """Most memory this process has held since it began its program.

    On Linux from /proc: getrusage also counts what the parent held when it forked.
    """
    import resource

    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def facts() -> Data:
    """Hardware and versions."""
    from holdfast.versions import versions

    return {
        "system": platform.system(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    bf16 = any("avx512_bf16" in line for line in lines)
    return f"{names[0] if names else platform.machine()}{' with AVX512-BF16' if bf16 else ''}"


def in_subprocess(script: str | Path, settings: Any) -> Data:
    """Run `script --child <settings>` in a process of its own; its last line is the answer."""
    command = [sys.executable, str(script), "--child", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {settings} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def as_json(blocks: Mapping[str, Sequence[Block]]) -> dict[str, list[Data]]:
    return {name: [asdict(b) for b in of] for name, of in blocks.items()}
