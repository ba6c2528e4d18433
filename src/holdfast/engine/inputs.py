"""Looking at what goes into chosen modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def watched(modules: Mapping[str, torch.nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` with the name of a module and its first input, before every call of a module, for the duration."""
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(lambda _m, args, name=name: see(name, args[0]))
            stack.callback(handle.remove)
        yield
