"""What a run holds in memory: one formula for every part of every method, checked against measured small models.

    python benchmarks/scale.py            # writes benchmarks/results/scale.json and the tables of docs/scale.md
    python benchmarks/scale.py --table    # only the tables

The formulas follow the plain host: frozen weights in bf16, trained ones in fp32, AdamW, bf16 autocast, packed rows,
logits at scored positions. They count tensors; what a GPU allocator wastes, CUDA itself (some 0.5 to 1 GB) and the
workspaces of matrix products are not in them. The measured side is the growth of the process's resident memory on a
CPU, each case in a process of its own, from before the model is built to the peak of three steps.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Data = dict[str, Any]
HALF, WHOLE, MOMENTS = 2, 4, 8  # bytes of a bf16 number, an fp32 number, AdamW's two fp32 moments
GB = 1e9
PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
RESULTS = Path(__file__).parent / "results" / "scale.json"
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Shape:
    """A Llama: L blocks of width D, q and kv wide attention, I wide feed-forward, vocabulary V."""

    width: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    inner: int
    head: int
    tied: bool = True

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the seven matrices of a block."""
        d, q, kv, i = self.width, self.heads * self.head, self.kv_heads * self.head, self.inner
        return {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "gate": (i, d), "up": (i, d), "down": (d, i)}

    @property
    def block(self) -> int:
        """Parameters of a block's matrices."""
        return sum(m * n for m, n in self.matrices.values())

    @property
    def embedding(self) -> int:
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        tables = self.embedding * (1 if self.tied else 2)
        return self.layers * (self.block + 2 * self.width) + self.width + tables


def shape_of(settings: Data) -> Shape:
    """From the settings of a LlamaConfig (_common.SIZES)."""
    heads = settings["num_attention_heads"]
    return Shape(
        settings["hidden_size"], settings["num_hidden_layers"], settings["vocab_size"], heads,
        settings["num_key_value_heads"], settings["intermediate_size"], settings["hidden_size"] // heads,
        settings["tie_word_embeddings"],
    )  # fmt: skip


LLAMA_70B = Shape(8192, 80, 128256, 64, 8, 28672, 128, tied=False)
LLAMA_1B = Shape(2048, 16, 128256, 32, 8, 8192, 64)


@dataclass(frozen=True)
class Step:
    """One forward: tokens of all rows, scored positions of all owners, and how many of each are a method's own rows.

    stored: positions whose last hidden state the teacher keeps.
    """

    tokens: int
    scored: int
    aside_tokens: int = 0
    aside_scored: int = 0
    stored: int = 0

    @property
    def all_tokens(self) -> int:
        return self.tokens + self.aside_tokens

    @property
    def all_scored(self) -> int:
        return self.scored + self.aside_scored


@dataclass(frozen=True)
class Setup:
    """What trains and which methods take part, by name."""

    lora: bool = True
    rank: int = 16
    methods: tuple[str, ...] = ()
    checkpointing: bool = False
    four_bit: bool = False
    rank_frac: float = 0.5  # OrthogonalSubspace
    virtual_tokens: int = 20  # ProMoT

    def has(self, *names: str) -> bool:
        return bool({*names} & {*self.methods})


FULL = Setup(lora=False)
KL = ("ICLAnchor", "KLToBase", "AnchoredSFT")
COPIES = ("L2ToInit", "WiSEFT", "LiNeS")


# ---- what is held all the time


def adapter(shape: Shape, rank: int) -> int:
    """Numbers in LoRA on all linear maps of the blocks: L sum r (m + n)."""
    return shape.layers * sum(rank * (m + n) for m, n in shape.matrices.values())


def trained(shape: Shape, setup: Setup) -> int:
    """Numbers that train. HalfFineTune trains half of the blocks and all tables."""
    if setup.lora:
        return adapter(shape, setup.rank)
    if setup.has("HalfFineTune"):
        return shape.parameters - shape.layers * (shape.block // 2 + shape.width)
    return shape.parameters


def frozen_bytes(shape: Shape, setup: Setup) -> float:
    """2 bytes a frozen number; NF4: 1/2 byte, and per block of 64 a 1-byte scale, and per 256 of those an fp32 one."""
    count = shape.parameters - (0 if setup.lora else trained(shape, setup))
    if not setup.four_bit:
        return HALF * count
    packed = shape.layers * shape.block
    return HALF * (count - packed) + packed * (1 / 2 + 1 / 64 + 4 / (64 * 256))


def bases_bytes(shape: Shape, rank_frac: float) -> int:
    """OrthogonalSubspace: U (m, k) and V (k, n) of every matrix in fp32, k = rank_frac min(m, n)."""
    return WHOLE * shape.layers * sum(int(rank_frac * min(s)) * sum(s) for s in shape.matrices.values())


def soft_prompt_bytes(shape: Shape, setup: Setup) -> int:
    """ProMoT: p rows of width D, trained in fp32, and their starting values."""
    return setup.virtual_tokens * shape.width * (WHOLE + MOMENTS + WHOLE + WHOLE)


def held(shape: Shape, setup: Setup, step: Step) -> dict[str, float]:
    """Bytes that stay from the first step to the last."""
    count = trained(shape, setup)
    out = {"frozen weights": frozen_bytes(shape, setup), "trained weights": WHOLE * count, "moments": MOMENTS * count}
    if setup.has(*KL):
        out["teacher: hidden states"] = HALF * shape.width * step.stored
        out["teacher: head"] = 0 if setup.lora else HALF * shape.embedding
    if setup.has(*COPIES):
        out["copy of the base"] = 0 if setup.lora else HALF * shape.parameters
    if setup.has("OrthogonalSubspace"):
        out["preserved bases"] = bases_bytes(shape, setup.rank_frac)
    if setup.has("ProMoT"):
        out["soft prompt"] = soft_prompt_bytes(shape, setup)
    return out


# ---- what comes and goes in a step


def block_activations(shape: Shape, setup: Setup) -> int:
    """Bytes a token leaves in one block for the backward.

    LoRA, residual in bf16: 2 norms (input in fp32, output) 12 D; attention (q, k, v, its output twice: as the kernel
    keeps it and as o reads it) 6 q + 4 kv, and 4 bytes a head; feed-forward (gate, silu, up, product) 8 I; A x: 14 r.
    Full, residual in fp32: 2 norms (input, normed in fp32) 16 D; what q, k, v, gate and up read, cast once each, 10 D.
    """
    d, q, kv = shape.width, shape.heads * shape.head, shape.kv_heads * shape.head
    same = 6 * q + 4 * kv + 4 * shape.heads + 8 * shape.inner + 2 * WHOLE
    return same + (12 * d + HALF * len(MATRICES) * setup.rank if setup.lora else 26 * d)


def activations(shape: Shape, setup: Setup, step: Step) -> float:
    """Of all blocks and the last norm. With checkpointing: every block's input, and one block while it is redone."""
    residual = HALF if setup.lora else WHOLE
    one, tokens = block_activations(shape, setup), step.all_tokens
    last = (WHOLE if setup.lora else 2 * WHOLE) * shape.width * tokens + HALF * shape.width * step.all_scored
    if setup.checkpointing:
        return tokens * (shape.layers * residual * shape.width + one) + last
    return tokens * shape.layers * one + last


def logits_bytes(shape: Shape, setup: Setup, step: Step) -> int:
    """Most bytes at the head, N scored positions and M of them under a KL, V numbers each.

    Forward: logits 2, their fp32 copy 4, log-probabilities 4: 10 N V; then for the KL its log-probabilities 4, the
    base's 4, their exponential 4, the difference 4 and the product 4: 6 N V + 20 M V.
    Backward: saved log-probabilities 4, their gradient 4, that of the logits 4: 12 N V. A KL picks rows of them, and
    then two gradients 4 + 4 are added to a third: 16 N V, and 4 M V for the saved exponential.
    """
    n = step.all_scored * shape.vocab
    if not setup.has(*KL):
        return 12 * n
    m = (step.aside_scored or step.scored) * shape.vocab
    return max(16 * n + 4 * m, 6 * n + 20 * m)


def autocast_bytes(shape: Shape, setup: Setup) -> int:
    """bf16 copies that autocast makes of trained matrices for one forward (the head's too)."""
    if setup.lora:
        return HALF * adapter(shape, setup.rank)
    return HALF * (trained(shape, setup) - (0 if shape.tied else shape.embedding))


def passing(shape: Shape, setup: Setup, step: Step) -> dict[str, dict[str, float]]:
    """Bytes beside the held ones, at the three moments that can be the peak of a step."""
    count = trained(shape, setup)
    seen: dict[str, float] = {
        "bf16 copies": autocast_bytes(shape, setup),
        "activations": activations(shape, setup, step),
    }
    if setup.four_bit:  # bitsandbytes unpacks a matrix for its product, forward and backward
        seen["unpacked matrix"] = HALF * max(m * n for m, n in shape.matrices.values())
    if setup.has("L2ToInit") and not setup.lora:
        seen["L2ToInit: differences"] = WHOLE * count  # kept for their square's gradient
    head = {} if setup.lora else {"gradient of the head": (HALF + WHOLE) * shape.embedding}
    after: dict[str, float] = {"gradients": WHOLE * count}
    if setup.has("OrthogonalSubspace"):
        after["weights before the step"] = WHOLE * shape.layers * shape.block
    return {
        "at the logits": {**seen, "logits": logits_bytes(shape, setup, step)},
        "at the head's gradient": {**seen, **head},
        "at the update": after,
    }


def peak(shape: Shape, setup: Setup, step: Step) -> tuple[float, str]:
    """(bytes, moment) of the peak of a step."""
    base = sum(held(shape, setup, step).values())
    moments = {name: base + sum(parts.values()) for name, parts in passing(shape, setup, step).items()}
    worst = max(moments, key=lambda name: moments[name])
    return moments[worst], worst


# ---- the two machines of the page

TOKENS, SCORED = 4096, 512  # of a step on one card: rows of 128 tokens with answers of 16, say
CARDS = 8
WHOLE_ON_EVERY_CARD = (  # what FSDP2 does not cut, or what every card has for its own rows
    "teacher: hidden states", "teacher: head", "preserved bases", "soft prompt", "activations", "logits",
)  # fmt: skip


def cut(parts: dict[str, float], cards: int) -> dict[str, float]:
    return {name: size / (1 if name in WHOLE_ON_EVERY_CARD else cards) for name, size in parts.items()}


def gathered(shape: Shape) -> int:
    """FSDP2 at work: two blocks (this and the next) and the tables, gathered in bf16."""
    return HALF * (2 * shape.block + shape.embedding * (1 if shape.tied else 2))


def card(shape: Shape, setup: Setup, step: Step, cards: int = 1) -> dict[str, float]:
    """Bytes on one card at the worst moment of a step, by part; more than one card means FSDP2."""
    base = cut(held(shape, setup, step), cards) | ({"gathered": gathered(shape)} if cards > 1 else {})
    moments = [cut(parts, cards) for parts in passing(shape, setup, step).values()]
    return base | max(moments, key=lambda parts: sum(parts.values()))


def anchored(step: Step, anchor: Data) -> Step:
    """A step with one prompt of ICLAnchor of mean length."""
    tokens = round(anchor["tokens"] / anchor["prompts"])
    return replace(step, aside_tokens=tokens, aside_scored=tokens, stored=anchor["positions"])


def part_rows(anchor: Data) -> list[tuple[str, str, Callable[[Shape], float]]]:
    """(part, formula, bytes) of the table of parts."""
    lora, full, half = Setup(), FULL, replace(FULL, methods=("HalfFineTune",))
    thousand = Step(1000, 0)
    scored = Step(0, 1000)

    def kl(s: Shape) -> float:
        return logits_bytes(s, Setup(methods=("KLToBase",)), scored)

    return [
        ("frozen weights, bf16", "2 P", lambda s: frozen_bytes(s, lora)),
        ("frozen weights, 4 bits", "0.5159 of the blocks + 2 of the rest", lambda s: frozen_bytes(
            s, replace(lora, four_bit=True))),
        ("`LoRA`: adapter, gradients, moments, bf16 copies", "(4 + 4 + 8 + 2) L sum r (m + n)", lambda s: 18 * adapter(
            s, 16)),
        ("full: weights, gradients, moments, bf16 copies", "(4 + 4 + 8 + 2) P", lambda s: (
            16 * s.parameters + autocast_bytes(s, full))),
        ("`HalfFineTune`: the same, and its frozen half", "18 of what trains + 2 of what does not", lambda s: (
            16 * trained(s, half) + autocast_bytes(s, half) + frozen_bytes(s, half))),
        ("activations, LoRA, a thousand tokens", "L (12 D + 6 q + 4 kv + 8 I + 4 H + 14 r + 8)", lambda s: activations(
            s, lora, thousand)),
        ("the same with checkpointing", "2 L D, and one block", lambda s: activations(
            s, replace(lora, checkpointing=True), thousand)),
        ("activations, full, a thousand tokens", "L (26 D + 6 q + 4 kv + 8 I + 4 H + 8)", lambda s: activations(
            s, full, thousand)),
        ("the same with checkpointing", "4 L D, and one block", lambda s: activations(
            s, replace(full, checkpointing=True), thousand)),
        ("logits, a thousand scored positions", "12 V", lambda s: logits_bytes(s, lora, scored)),
        ("logits under a KL, a thousand positions", "26 V", kl),
        ("`ICLAnchor`: hidden states of its 512 prompts", "2 D a position", lambda s: (
            HALF * s.width * anchor["positions"])),
        ("`KLToBase`, `AnchoredSFT`: a million answer tokens", "2 D a position", lambda s: HALF * s.width * 1e6),
        ("any KL, full: the base's head", "2 V D", lambda s: HALF * s.embedding),
        ("any KL on rows not known before, full: frozen copy", "2 P", lambda s: HALF * s.parameters),
        ("`L2ToInit`, `WiSEFT`, `LiNeS`, full: base weights", "2 P", lambda s: HALF * s.parameters),
        ("`L2ToInit`, full: differences, kept for their gradient", "4 P", lambda s: WHOLE * s.parameters),
        ("`OrthogonalSubspace`: bases U, V", "4 L sum k (m + n), k = min(m, n) / 2", lambda s: bases_bytes(s, 0.5)),
        ("`OrthogonalSubspace`: weights before the step", "4 of the blocks", lambda s: WHOLE * s.layers * s.block),
        ("`OrthogonalSubspace`: SVD of the largest matrix", "4 (m n + k (m + n)), k = min(m, n)", lambda s: max(
            WHOLE * (m * n + min(m, n) * (m + n)) for m, n in s.matrices.values())),
        ("`ProMoT`: prompt of 20 rows", "20 (4 + 4 + 8 + 4) D", lambda s: soft_prompt_bytes(s, lora)),
    ]  # fmt: skip


def parts_table(anchor: Data) -> list[str]:
    lines = ["| part | bytes | 1B: GB | 70B: GB |", "|---|---|---|---|"]
    return lines + [
        f"| {name} | {formula} | {_gb(size(LLAMA_1B))} | {_gb(size(LLAMA_70B))} |"
        for name, formula, size in part_rows(anchor)
    ]


def _gb(size: float) -> str:
    value = size / GB
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def machines(anchor: Data) -> list[tuple[str, Shape, Setup, Step, int, float]]:
    """(name, model, setup, step, cards, GB of a card) of the table of whole runs."""
    step, default = Step(TOKENS, SCORED), ("ICLAnchor",)
    both = anchored(step, anchor)
    small, large = (LLAMA_1B, 1, 24.0), (LLAMA_70B, CARDS, 80.0)

    def row(name: str, machine: tuple[Shape, int, float], setup: Setup, at: Step = step) -> Any:
        shape, cards, room = machine
        return name, shape, setup, at, cards, room

    less = {"checkpointing": True}
    alone = (LLAMA_70B, 1, 80.0)
    return [
        row("1B: LoRA + ICLAnchor", small, Setup(methods=default), both),
        row("1B: LoRA + ICLAnchor, checkpointing", small, Setup(methods=default, **less), both),
        row("1B: full", small, FULL),
        row("1B: full, checkpointing", small, replace(FULL, **less)),
        row("1B: full + ICLAnchor, checkpointing", small, replace(FULL, methods=default, **less), both),
        row("1B: full + L2ToInit, checkpointing", small, replace(FULL, methods=("L2ToInit",), **less)),
        row("1B: full + WiSEFT, checkpointing", small, replace(FULL, methods=("WiSEFT",), **less)),
        row("1B: HalfFineTune, checkpointing", small, replace(FULL, methods=("HalfFineTune",), **less)),
        row("1B: OrthogonalSubspace, checkpointing", small, replace(FULL, methods=("OrthogonalSubspace",), **less)),
        row("70B: LoRA + ICLAnchor, 4 bits, checkpointing, a copy on every card", alone,
            Setup(methods=default, four_bit=True, **less), both),
        row("70B: LoRA + ICLAnchor, FSDP2", large, Setup(methods=default), both),
        row("70B: LoRA + ICLAnchor, FSDP2, checkpointing", large, Setup(methods=default, **less), both),
        row("70B: full, FSDP2, checkpointing", large, replace(FULL, **less)),
    ]  # fmt: skip


GROUPS = {
    "weights": ("frozen weights", "trained weights", "gathered", "unpacked matrix"),
    "moments": ("moments",),
    "gradients, bf16 copies": ("gradients", "bf16 copies", "gradient of the head"),
    "activations": ("activations",),
    "logits": ("logits",),
}


def machines_table(anchor: Data) -> list[str]:
    lines = [
        f"| run | {' | '.join(GROUPS)} | the method's own | sum, GB | of | |",
        "|---|" + "---|" * (len(GROUPS) + 4),
    ]
    for name, shape, setup, step, cards, room in machines(anchor):
        parts = card(shape, setup, step, cards)
        known = {n: sum(parts.get(p, 0) for p in of) for n, of in GROUPS.items()}
        total = sum(parts.values())
        cells = [*(_gb(x) for x in known.values()), _gb(total - sum(known.values())), f"**{_gb(total)}**"]
        fits = "fits" if total / GB < 0.9 * room else "tight" if total / GB < room else "does not fit"
        lines.append(f"| {name} | {' | '.join(cells)} | {room:.0f} | {fits} |")
    return lines


def measured_table(found: Data) -> list[str]:
    """Predicted against measured; the worst ratio last."""
    lines = [
        "| run | model | measured, MB | predicted, MB | measured / predicted | peak |",
        "|---|---|---|---|---|---|",
    ]
    for key, one in found["cases"].items():
        name, size = key.split(" | ")
        ratio = one["measured"] / one["predicted"]
        lines.append(
            f"| {name} | {size} | {one['measured'] / 1e6:.0f} | {one['predicted'] / 1e6:.0f} | **{ratio:.2f}** "
            f"| {one['moment']} |"
        )
    return lines


def write_page(page: Path, found: Data) -> None:
    """Put the tables between their marks; everything else on the page is written by hand."""
    text = page.read_text(encoding="utf-8")
    tables = {"parts": parts_table(found["anchor"]), "runs": machines_table(found["anchor"])}
    for name, lines in {**tables, "measured": measured_table(found)}.items():
        start, end = f"<!-- scale.py: {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


# ---- small models, measured

SMALL = ("10M", "30M", "100M")
LENGTH, ROWS, STEPS, POOL = 512, 2, 3, 32
CASES: dict[str, tuple[Setup, tuple[str, ...]]] = {
    "LoRA": (Setup(), SMALL),
    "LoRA, checkpointing": (Setup(checkpointing=True), ("30M",)),
    "LoRA + ICLAnchor (the default)": (Setup(methods=("ICLAnchor",)), SMALL),
    "full": (FULL, SMALL),
    "full, checkpointing": (replace(FULL, checkpointing=True), ("30M",)),
    "full + ICLAnchor": (replace(FULL, methods=("ICLAnchor",)), ("30M",)),
    "full + KLToBase": (replace(FULL, methods=("KLToBase",)), ("30M",)),
    "full + L2ToInit": (replace(FULL, methods=("L2ToInit",)), ("30M",)),
    "full + WiSEFT": (replace(FULL, methods=("WiSEFT",)), ("30M",)),
    "HalfFineTune": (replace(FULL, methods=("HalfFineTune",)), ("30M",)),
    "OrthogonalSubspace": (replace(FULL, methods=("OrthogonalSubspace",)), ("30M",)),
    "LoRA + ProMoT": (Setup(methods=("ProMoT",)), ("30M",)),
}


def child(settings: Data) -> Data:
    """Peak of one case, in this fresh process; the first, tiny run loads every library and starts every thread."""
    import _common as C

    setup = CASES[settings["case"]][0]
    tokenizer = C.build_tokenizer()
    _train("tiny", tokenizer, setup, 1)
    C.tidy()
    before = _reset_peak()
    step = _train(settings["size"], tokenizer, setup, STEPS)
    shape = shape_of(C.SIZES[settings["size"]])
    predicted, moment = peak(shape, setup, step)
    return {"measured": _peak_now() - before, "predicted": predicted, "moment": moment, "step": vars(step)}


def _train(size: str, tokenizer: Any, setup: Setup, steps: int) -> Step:
    """Train a random Llama; returns the largest step."""
    import _common as C
    from holdfast import methods as M
    from holdfast.services import Context

    model = C.random_llama(size, tokenizer)
    if setup.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = C.stream_rows(tokenizer, LENGTH, ROWS)
    chosen = [getattr(M, n)(pool=POOL) if n == "ICLAnchor" else getattr(M, n)() for n in setup.methods]
    context = Context(model, tokenizer)
    pools = {m.name: m.asides(context) for m in chosen if m.name == "ICLAnchor"}
    C.ours(model, tokenizer, C.Job(rows, steps, ROWS, "lora" if setup.lora else "full"), chosen, run_steps=0)
    asides = max(
        (
            [pool[i] for i in m.asides_at(n, len(pool), steps)]
            for n in range(steps)
            for m in chosen
            for pool in _of(m, pools)
        ),
        key=lambda picked: sum(len(r.ids) for r in picked),
        default=[],
    )
    stored = sum(r.num_scored for pool in pools.values() for r in pool)
    stored += sum(r.num_scored for r in rows) if setup.has("KLToBase") else 0
    tokens, scored = (sum(f(r) for r in asides) for f in (lambda r: len(r.ids), lambda r: r.num_scored))
    extra = setup.virtual_tokens * ROWS if setup.has("ProMoT") else 0
    return Step(LENGTH * ROWS + extra, sum(r.num_scored for r in rows), tokens, scored, stored)


def _of(method: Any, pools: Data) -> list[Any]:
    return [pools[method.name]] if method.name in pools else []


def _reset_peak() -> int:
    """Start the peak anew (Linux); returns what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak_now() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def anchor_pool() -> Data:
    """Size of ICLAnchor's default pool in the tokens of SmolLM2."""
    from holdfast import methods as M
    from holdfast import models
    from holdfast.services import Context

    tokenizer = models.load_tokenizer(models.resolve("smollm2-135m"), False)
    rows = M.ICLAnchor().asides(Context(None, tokenizer))
    return {
        "prompts": len(rows),
        "tokens": sum(len(r.ids) for r in rows),
        "positions": sum(r.num_scored for r in rows),
    }


def measure(out: Path, only: str | None) -> None:
    """Add the cases that are not in `out` yet."""
    import _common as C
    from holdfast.files import write_json

    # every large block goes back to the system when it is freed, so that resident memory is what is held
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"cases": {}}
    found = {"anchor": anchor_pool(), **found}
    for name, (_, sizes) in CASES.items():
        for size in sizes:
            key = f"{name} | {size}"
            if key not in found["cases"] and (only is None or only in key):
                one = found["cases"][key] = C.in_subprocess(__file__, {"case": name, "size": size})
                print(f"{key}: {one['measured'] / 1e6:.0f} MB, predicted {one['predicted'] / 1e6:.0f}", flush=True)
                found["facts"] = C.facts()
                out.parent.mkdir(parents=True, exist_ok=True)
                write_json(out, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", help="measure only cases whose name holds this")
    parser.add_argument("--table", action="store_true", help="write the tables, measure nothing")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    if not args.table:
        measure(args.out, args.only)
    found = json.loads(args.out.read_text(encoding="utf-8"))
    print("\n".join([*parts_table(found["anchor"]), "", *machines_table(found["anchor"]), "", *measured_table(found)]))
    if args.out == RESULTS:
        write_page(PAGE, found)


if __name__ == "__main__":
    main()
