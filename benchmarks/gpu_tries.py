"""Ours alone on a GPU: with one suspect changed at a time, and one step under the profiler."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import _common as C
from stand_in import varlen_attn


@contextmanager
def _cudnn() -> Iterator[None]:
    """Scaled-dot-product attention as torch chooses, cuDNN's plans among it."""
    from holdfast.engine import attention

    kept, attention.no_plans = attention.no_plans, lambda _: nullcontext()
    try:
        with attention.only("blocks"):
            yield
    finally:
        attention.no_plans = kept


@contextmanager
def _cudnn_off() -> Iterator[None]:
    from holdfast.engine import attention

    with attention.only("blocks"):
        yield


@contextmanager
def _way(name: str) -> Iterator[None]:
    from holdfast.engine import attention

    with attention.only(name, None if torch.cuda.is_available() else varlen_attn):
        yield


@contextmanager
def _pageable() -> Iterator[None]:
    """Copies that the host waits for."""
    from holdfast import services, session
    from holdfast.engine import layout, pack, ways

    kept, users = layout.upload, (layout, pack, ways, services, session)
    for module in users:
        module.upload = lambda array, device: torch.as_tensor(array, device=device)
    try:
        yield
    finally:
        for module in users:
            module.upload = kept


TRIES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "cudnn-on": _cudnn,
    "cudnn-off": _cudnn_off,
    "varlen": lambda: _way("varlen"),
    "fixed": lambda: _way("fixed"),
    "pageable": _pageable,
}


def tries(plan: Any, names: Sequence[str]) -> C.Data:
    """Tokens a second of LoRA at the smallest setting, as it is and with each change, in turn after a warm block."""
    unknown = set(names) - set(TRIES)
    if unknown:
        raise SystemExit(f"--try knows no {', '.join(sorted(unknown))}; it knows {', '.join(TRIES)}.")
    if not names:
        return {}
    blocks: dict[str, list[C.Block]] = {"as it is": [], **{n: [] for n in names}}
    lost: C.Data = {}
    for _ in range(plan.cycles + plan.warm):
        for name, own in blocks.items():
            if name in lost:
                continue
            try:
                with TRIES[name]() if name in TRIES else nullcontext():
                    own.append(_block(plan, C.ours))
            except Exception as error:  # a kernel that is not there says nothing about the other suspects
                lost[name] = {"error": C.said(error)}
                print(f"  {name}: {lost[name]['error']}", flush=True)
            else:
                print(f"  {name}: {own[-1].rate():.0f} tokens/s, first block {own[0].rate():.0f}", flush=True)
            C.tidy()
    good = {n: b for n, b in blocks.items() if n not in lost}
    return {**lost, **{n: {"rate": C.middle(b[plan.warm :]), "first_block": b[0].rate()} for n, b in good.items()}}


def _block(plan: Any, run: Callable[..., Any], **more: Any) -> Any:
    tokenizer = C.build_tokenizer(plan.vocab)
    rows = C.rows_of("text", None, tokenizer)
    batch = max(1, round(plan.tokens[0] / statistics.mean(len(r.ids) for r in rows)))
    return run(C.random_llama(plan.models[0], tokenizer), tokenizer, C.Job(rows, plan.steps, batch), **more)


def profiled(plan: Any) -> C.Data:
    """A run under the profiler: where the device's time goes, and the share of the wall clock in which it had none."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    _block(plan, C.ours)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds, acc_events=True) as seen:
        block = _block(plan, C.ours)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    longest = sorted(seen.key_averages(), key=lambda e: -getattr(e, name))[:10]
    busy = sum(getattr(e, name) for e in seen.key_averages()) / 1e6
    return {
        "longest": [[e.key, getattr(e, name) / 1e6, e.count] for e in longest],
        "busy_seconds": busy,
        "step_seconds": block.seconds,
        "idle_share": 1 - busy / plan.steps / statistics.median(block.seconds) if cuda else None,
        "device": "cuda" if cuda else "cpu",
    }
