"""Whether a saved model may be merged with the base in memory: its relatives may, other models may not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.engine.ways import inner
from holdfast.errors import ModelError
from holdfast.files import read_json
from holdfast.models import loadable
from holdfast.models.identity import TOKENIZER_FILES
from holdfast.models.loading import load_tokenizer
from holdfast.models.shards import PIECE
from holdfast.models.source import ModelSource
from holdfast.models.tensors import SAME_BASE, Saved, tensors_of

if TYPE_CHECKING:
    import torch

    Weights = Mapping[str, torch.Tensor]

LEAST_CORRELATION = 0.1  # ours: unrelated models of 10,000 weights or more lie below 0.05, tuned ones near 1


def check_related(source: ModelSource, base: Any, tokenizer: Any = None, weights: Weights | None = None) -> None:
    """Raise ModelError unless the tensors of `source` can be merged with those of `base`.

    The cheap is looked at first: packing, architecture, tied embeddings, shapes, tokens. Then every tensor is read
    once, one at a time: a model descends from the base when its matrices correlate with the base's, and an adapter
    must name a base whose weights are these.

    Args:
        base: the untouched base in memory, plain weights.
        tokenizer: of the base; None where nobody knows it.
        weights: of the base by name, where `base` itself holds none (the meta device); may read them one by one.
    """
    may_read(source)
    _same_kind(source, inner(base).config)
    _same_tokens(source, tokenizer)
    found = _correlation(source, base, weights or {n: p.detach() for n, p in inner(base).named_parameters()})
    if math.isnan(found):
        what = f"{source.label} or its base holds weights that are no finite numbers."
        raise ModelError(what, "Name a copy or a checkpoint from before they broke.")
    if found < LEAST_CORRELATION:
        what = f"{source.label} does not descend from the base: its weights correlate with the base's by {found:.2f}."
        raise ModelError(what, SAME_BASE)


def _correlation(source: ModelSource, base: Any, weights: Weights) -> float:
    """The cosine of all matrices of `source` and of the base; checks the base of an adapter on the way."""
    other, below = tensors_of(source, base), tensors_of(source.base, base) if source.base else None
    both = one = two = 0.0
    for name, p in weights.items():
        if below is not None:
            _same_weights(source, name, p, below.read(name, p))
        if p.ndim >= 2:
            new = other.stored(name) if isinstance(other, Saved) else other.read(name, p.float())
            for a, b, c in _products(p, new):
                both, one, two = both + a, one + b, two + c
    return both / math.sqrt(one * two) if one * two > 0 else math.nan


def _products(one: torch.Tensor, two: torch.Tensor) -> Iterator[tuple[float, float, float]]:
    """Products of two tensors with each other and with themselves, in pieces that stay in the cache of a core."""
    import torch

    from holdfast.engine.threads import side_by_side

    def products(pieces: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float, float]:
        a, b = (t.to(one.device).float() for t in pieces)
        return float(a @ b), float(a @ a), float(b @ b)

    pieces = list(zip(one.flatten().split(PIECE), two.flatten().split(PIECE), strict=True))
    few = one.device.type != "cpu" or len(pieces) < 2
    return side_by_side(products, pieces, 1 if few else torch.get_num_threads())


def may_read(source: ModelSource) -> None:
    """Raise ModelError for a model whose files do not hold plain weights."""
    if source.kind == "replaced":
        what = f"{source.label} holds replaced modules, which are no change of its base's weights."
        raise ModelError(what, "Tune with export.merge, where the method can fold its modules in.")
    packed = loadable.quantisation(source)
    if packed is not None:
        what = f"{source.label} is quantised with {loadable.method_of(packed)}, and packed weights cannot be merged."
        raise ModelError(what, "Name the unquantised model.")
    while source.base is not None:
        source = source.base
    loadable.may_unpack(source)


def _same_kind(source: ModelSource, base: Any) -> None:
    label = source.label
    while source.base is not None:
        source = source.base
    config = read_json(Path(source.path) / "config.json")
    kind = config.get("model_type")
    if kind != base.model_type:
        raise ModelError(f"{label} is of architecture {kind}, and the base of {base.model_type}.", SAME_BASE)
    from transformers import AutoConfig

    tied = bool(AutoConfig.from_pretrained(source.path, local_files_only=True).tie_word_embeddings)
    if tied != bool(base.tie_word_embeddings):
        one, other = ("ties", "does not") if tied else ("does not tie", "does")
        raise ModelError(f"{label} {one} its embeddings, and the base {other}.", SAME_BASE)


def _same_tokens(source: ModelSource, tokenizer: Any) -> None:
    """The same words under the same numbers, where a tokenizer was saved beside the weights."""
    saved = any((Path(source.path) / f).is_file() for f in ("tokenizer_config.json", *TOKENIZER_FILES))
    if tokenizer is None or not saved:
        return
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(source, False).get_vocab()
    other = next((t for t in sorted({*ours, *theirs}) if ours.get(t) != theirs.get(t)), None)
    if other is not None:
        numbers = f"{other!r} is token {theirs.get(other, 'none')} there, {ours.get(other, 'none')} here"
        what = f"{source.label} has another vocabulary than the base: {numbers}."
        raise ModelError(what, SAME_BASE)


def _same_weights(source: ModelSource, name: str, p: torch.Tensor, theirs: torch.Tensor) -> None:
    """The base that an adapter names must be the base in memory, in its precision."""
    import torch

    assert source.base
    if not torch.equal(theirs.to(p.dtype), p) and not torch.equal(theirs.bfloat16(), p.bfloat16()):
        what = f"{source.name} is an adapter on {source.base.label}, whose {name} is not the base's."
        raise ModelError(what, "Name an adapter that was trained on the base of this run.")
