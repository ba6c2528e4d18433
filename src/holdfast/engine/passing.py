"""Blocks of a model that stay on the host and pass through the device one at a time, while the base is asked.

A base that will be cut over processes (FSDP2) may be larger than a device. Its weights as transformers loads them from
safetensors are memory-mapped, so the processes of a host share one copy of them; a device holds a block while it
computes, and what lies beside the blocks (embeddings, last norm, head). Results are those of the whole model to the
last bit. Only for forwards without gradients: nothing is kept for a backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from holdfast.engine.ways import blocks, inner

KEPT = "_holdfast_passing"  # attribute of the model: the device, and the hooks that bring its blocks there
HOST = "_holdfast_host"  # attribute of a block that computes: where its weights lie on the host


def pass_blocks(model: Any, device: torch.device) -> None:
    """From now on each block of `model` is on `device` while it computes, and all else for good.

    Raises:
        ModelError: the model names no blocks and has no list of them.
    """
    core = inner(model)
    names = set(getattr(core, "_no_split_modules", None) or ())  # what FSDP cuts apart
    inside = [m for m in core.modules() if type(m).__name__ in names] or list(blocks(core))
    passing = {id(p) for block in inside for p in block.parameters()}
    for p in core.parameters():
        if id(p) not in passing:
            p.data = p.data.to(device)
    for module in core.modules():  # small: those of blocks go there for good too
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    hooks = []
    for block in inside:
        hooks.append(block.register_forward_pre_hook(partial(_bring, device)))
        hooks.append(block.register_forward_hook(_take_back, always_call=True))
    core.__dict__[KEPT] = device, hooks


def passes(model: Any) -> bool:
    """Whether blocks of the model pass through its device."""
    return KEPT in inner(model).__dict__


def stay(model: Any, *, whole: bool = False) -> None:
    """No block passes any more. With `whole` all of them go to the device, else they stay on the host.

    Does nothing to a model whose blocks do not pass.
    """
    core = inner(model)
    device, hooks = core.__dict__.pop(KEPT, (None, ()))
    for hook in hooks:
        hook.remove()
    if whole and device is not None:
        for p in core.parameters():
            p.data = p.data.to(device)


def _bring(device: torch.device, block: Any, _args: Any) -> None:
    """A copy on the device stands for the block's weights; on a CPU too, so that tests see what a GPU would hold."""
    weights = [p for p in block.parameters() if not hasattr(p, "full_tensor")]  # FSDP2 has cut it: it brings its own
    block.__dict__[HOST] = [(p, p.data) for p in weights]
    for p in weights:
        p.data = p.data.to(device, copy=True)


def _take_back(block: Any, *_: Any) -> None:
    for p, data in block.__dict__.pop(HOST, ()):
        p.data = data
