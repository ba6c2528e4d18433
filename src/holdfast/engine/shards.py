"""Tensors that are cut over processes (FSDP2's DTensor), and plain ones, by the same two words."""

from __future__ import annotations

from typing import Any

import torch


def whole(t: torch.Tensor) -> torch.Tensor:
    """All of a tensor: gathered from every process if it is cut (they must all ask), else `t` itself."""
    gather: Any = getattr(t, "full_tensor", None)
    return t if gather is None else gather()


def cut_like(t: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal in every process, cut as `other` is; `t` itself where `other` is not cut."""
    if not hasattr(other, "full_tensor"):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    model: Any = other
    same = DTensor.from_local(t, model.device_mesh, [Replicate()] * model.device_mesh.ndim, run_check=False)
    return same.redistribute(placements=model.placements)
