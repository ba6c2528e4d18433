"""A model that reads along: its next-token logits for what another model is generating, with a cache of its own."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from holdfast.engine.ways import inner
from holdfast.errors import ModelError


class Beside:
    """A frozen model beside the one that generates. It keeps its keys and values from token to token.

    What it is asked may go back (a rejected draft) or change its rows (beams): it keeps the leading tokens that are
    the same in all rows and reads the rest again, so its logits depend on the tokens alone, up to rounding.

    Args:
        model: a causal language model; put into eval mode.
        mask: (B, T) of the prompts, 0 where they are padded on the left; None: nothing is padding.
    """

    def __init__(self, model: Any, mask: torch.Tensor | None = None):
        self.model, self.mask = model.eval(), mask
        self._accepts = set(inspect.signature(inner(model).forward).parameters)
        self._seen: torch.Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, V) fp32 logits of the token behind `ids` (B, T).

        Raises:
            ModelError: rows of unequal padding and no mask, or a mask of other prompts.
        """
        ids = ids.to(next(self.model.parameters()).device)
        mask = self._mask_of(ids)
        known = self._known(ids)
        more: dict[str, Any] = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, known:], "logits_to_keep": 1}
        out = self.model(
            input_ids=ids[:, known:],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **{k: v for k, v in more.items() if k in self._accepts},
        )
        self._seen, self._cache = ids, getattr(out, "past_key_values", None)
        return out.logits[:, -1].float()

    def _known(self, ids: torch.Tensor) -> int:
        """How many leading tokens of all rows the cache holds; it is cut to these."""
        before, self._seen = self._seen, None
        known = 0
        if before is not None and self._cache is not None and len(before) == len(ids):
            width = min(before.shape[1], ids.shape[1])
            same = (before[:, :width] == ids[:, :width]).all(0)
            known = min(int(same.cumprod(0).sum()), ids.shape[1] - 1)
            known = known if self._cut(before.shape[1] - known) else 0
        if not known:
            self._cache = None
        return known

    def _cut(self, tokens: int) -> bool:
        """Whether the cache could forget its last tokens; a full sliding window and recurrent states cannot."""
        if not tokens:
            return True
        try:
            self._cache.crop(-tokens)
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        return True

    def _mask_of(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) 1 where a token counts. Rows may be several for each prompt (beams, returned sequences)."""
        mask = torch.ones_like(ids)
        if self.mask is None:
            self._may_do_without(ids)
            return mask
        given = self.mask.to(ids.device)
        if len(ids) % len(given) or given.shape[1] > ids.shape[1]:
            what = f"The attention mask has shape {tuple(given.shape)}, the tokens that are continued {(*ids.shape,)}."
            raise ModelError(what, "Make a new processor with the mask of these prompts.")
        mask[:, : given.shape[1]] = given.repeat_interleave(len(ids) // len(given), 0)
        return mask

    def _may_do_without(self, ids: torch.Tensor) -> None:
        """A processor is not told which tokens are padding."""
        pad = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        if pad is None or len(ids) == 1:
            return
        padding = (ids == pad).cumprod(1).sum(1)
        if int(padding.min()) != int(padding.max()):
            what = "The prompts begin with different numbers of padding tokens, and no attention mask was given."
            raise ModelError(what, "Give attention_mask= of the prompts, as to generate.")
