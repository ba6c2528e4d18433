"""NEFTune inside a plan: the noise of the batch that the trainer's collator made, on the rows read from it.

The formula, alpha / sqrt(L D), looks at the length L of the padded batch, which packed rows no longer have. So the
noise is drawn in the batch's own shape, as transformers draws it (the same numbers, as long as nothing else draws
between), and each row takes its own. Rows that a method asks for beside the task are read without noise; so is
everything in evaluation, and whatever the base is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.engine.ways import inner


@dataclass(frozen=True)
class Places:
    """A micro-batch as it was collated: (B, L), where each row's tokens stood in it, lengths of rows beside these."""

    shape: tuple[int, int]
    rows: Sequence[np.ndarray]
    asides: Sequence[int]


class Noise:
    """NEFTune's noise of strength `alpha` on the embeddings of `model`, for the forward that `expect` announces."""

    def __init__(self, model: Any, alpha: float, compiled: bool = False):
        self.alpha, self._next = alpha, None
        hook = torch.compiler.disable(self._add) if compiled else self._add
        self._handle = inner(model).get_input_embeddings().register_forward_hook(hook)

    def expect(self, places: Places | None) -> None:
        """The next forward in training mode reads these rows; None: no noise."""
        self._next = places

    def remove(self) -> None:
        self._handle.remove()

    def _add(self, module: torch.nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        """Hook of the embeddings: (1, T, D) packed, or (rows, width, D) padded on the right."""
        if self._next is None or not module.training:
            return out
        places, self._next = self._next, None
        rows = self._drawn(places, out)
        placed = torch.cat(rows)[None] if len(out) == 1 else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return out + placed

    def _drawn(self, places: Places, out: torch.Tensor) -> list[torch.Tensor]:
        """The noise of each row, (tokens, D)."""
        length, width = places.shape[1], out.shape[-1]
        most = self.alpha / torch.sqrt(torch.tensor(length * width))
        drawn = out.new_zeros(*places.shape, width).uniform_(-most, most).flatten(0, 1)
        rows = [drawn[torch.as_tensor(at, device=out.device)] for at in places.rows]
        return rows + [out.new_zeros(n, width) for n in places.asides]
