"""A base and a tuned model whose vocabularies differ: what they have in common can be merged.

A token is common when both know it under the same number. Of embeddings and head the rows of common tokens are the
base's; all others, which the base does not have, are taken from the tuned model, so no merge changes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError
from holdfast.files import read_json
from holdfast.models.loadable import embedding_names, skeleton
from holdfast.models.loading import load_tokenizer
from holdfast.models.source import ModelSource
from holdfast.models.tensors import SAME_BASE, Saved, shapes_of

if TYPE_CHECKING:
    import torch

LEAST = 0.5  # ours: of the tuned model's tokens; with fewer the two are not of one family


def common(base: Any, tuned: Any) -> list[int]:
    """Numbers that stand for the same token in both tokenizers, in order."""
    theirs = tuned.get_vocab()
    return sorted(n for token, n in base.get_vocab().items() if theirs.get(token) == n)


def offer(base: ModelSource, tuned: ModelSource) -> str | None:
    """What can be done about vocabularies that differ, as the cure of an error; None where they do not, or nothing."""
    if tuned.base is not None or _kind(base) != _kind(tuned):
        return None
    one, two = (load_tokenizer(s, False) for s in (base, tuned))
    both, every = common(one, two), len(two.get_vocab())
    same = len(both) == every == len(one.get_vocab()) and _rows(base) == _rows(tuned)
    if same or len(both) < LEAST * every:
        return None
    left = f" {every - len(both)} others stay as they are in {tuned.label}." if every > len(both) else ""
    return f"{len(both)} tokens are common: add --overlap (overlap=True) to merge all that belongs to them.{left}"


def _kind(source: ModelSource) -> Any:
    return read_json(Path(source.path) / "config.json").get("model_type")


def _rows(source: ModelSource) -> Any:
    return read_json(Path(source.path) / "config.json").get("vocab_size")


class Grown(Saved):
    """The weights of a base in the shapes of a tuned model that has other tokens.

    Args:
        like, wide: the base and the tuned model without weights.

    Raises:
        ModelError: more than the rows of embeddings and head differs, or too few tokens are common.
    """

    def __init__(self, base: ModelSource, tuned: ModelSource, like: Any, wide: Any):
        super().__init__(base, like)
        one, two = (load_tokenizer(s, False) for s in (base, tuned))
        ids, every = common(one, two), len(two.get_vocab())
        if len(ids) < LEAST * every:
            what = f"{tuned.label} and {base.label} have {len(ids)} tokens in common, of {every}."
            raise ModelError(what, SAME_BASE)
        self._tuned = Saved(tuned, wide)
        self._tables = {f"{name}.weight" for name in embedding_names(wide).values()}
        ours, theirs = shapes_of(like), shapes_of(wide)
        for name, shape in theirs.items():
            own = ours.get(name)
            if own != shape and (name not in self._tables or own is None or own[1:] != shape[1:]):
                what = f"{tuned.label} has {name} of shape {shape}, and {base.label} of shape {own}."
                raise ModelError(what, SAME_BASE)
        rows = min(shape[0] for found in (ours, theirs) for name, shape in found.items() if name in self._tables)
        self._ids = [n for n in ids if n < rows]

    def stored(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        own = super().stored(name)
        if name not in self._tables:
            return own
        table = self._tuned.stored(name).clone()
        table[self._ids] = own[self._ids].to(table.dtype)
        return table


def grown(base: ModelSource, tuned: ModelSource, like: Any) -> tuple[Grown, Any]:
    """(weights of the base, the tuned model without weights).

    Raises:
        ModelError: `tuned` is an adapter, or cannot be built without weights, or as `Grown`.
    """
    if tuned.base is not None:
        what = f"{tuned.label} is an adapter, which has no vocabulary of its own."
        raise ModelError(what, "Merge it into its base and save the whole, or leave --overlap out.")
    wide = skeleton(tuned, trust_remote_code=False)
    if wide is None:
        raise ModelError(f"{tuned.label} cannot be built without its weights.", SAME_BASE)
    return Grown(base, tuned, like, wide), wide
