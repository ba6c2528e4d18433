"""Fold an adapter into its base without changing what the model computes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError
from holdfast.models import loadable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def merged(model: Any, label: str) -> PreTrainedModel:
    """The plain model that computes what a PeftModel does, which is used up. Every merge goes through here.

    A weight that the adapter changes and that other modules share (a tied head) is untied first: each gets a copy of
    its own. Where they differ afterwards the configuration says that they are not tied, so what is saved loads as is.

    Args:
        label: the adapter and its base, for messages.

    Raises:
        ModelError: it cannot be folded in, or the outcome does not compute the same on two short rows.
    """
    from holdfast.engine import twins

    adapter, ties = model.peft_config[model.active_adapter], _ties(model.get_base_model())
    rows = twins.short_rows(model, loadable.token_ids(adapter))
    with twins.in_float32(model.eval()) as exact:
        before = twins.logits_of(model, rows)
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    try:
        with peft_quiet():
            untie(model, _touched(model))
            plain = model.merge_and_unload()
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        what = f"{label}: its {kind} adapter cannot be folded into the base: {text}"
        raise ModelError(what, "Use it unmerged, with plain peft.") from error
    _settle_ties(plain, ties, label)
    with twins.in_float32(plain):
        apart = twins.distance(before, twins.logits_of(plain, rows))
    limit = (twins.ROUNDED if exact else twins.ROUGH).get(plain.dtype, 1e-3)
    if not apart <= limit:
        what = (
            f"{label}: with its {kind} adapter folded in, the base computes something else: logits lie {apart:.2g} of "
            f"their spread from those of base and adapter, and rounding explains {limit:g}."
        )
        raise ModelError(what, "Use it unmerged, with plain peft, or keep the weights in float32.")
    return plain


def _touched(model: Any) -> list[torch.nn.Parameter]:
    """The base's own weights that lie in modules an adapter works on."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    layers += [m.original_module for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    return [p for layer in layers for p in layer.parameters()]


def untie(model: Any, params: Iterable[torch.nn.Parameter]) -> None:
    """Give every module but the first that holds one of `params` a copy of its own."""
    import torch

    wanted, seen = {id(p) for p in params}, set()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in seen:
                module._parameters[name] = torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            elif p is not None and id(p) in wanted:
                seen.add(id(p))


def _ties(model: Any) -> list[tuple[Any, bool]]:
    """Each configuration of a model that may tie its embeddings, and whether it does."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}
    return [(c, bool(c.tie_word_embeddings)) for c in configs.values() if hasattr(c, "tie_word_embeddings")]


def _settle_ties(model: Any, ties: list[tuple[Any, bool]], label: str) -> None:
    """Tie again what came out equal; where something did not, say so in the configuration."""
    named = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [(model.get_parameter(a), model.get_parameter(b)) for a, b in named.items()]
    equal = all(a is b or (a.shape == b.shape and bool((a == b).all())) for a, b in pairs)
    for config, tied in ties:  # peft has changed it already
        config.tie_word_embeddings = tied and equal
    if equal:
        model.tie_weights(recompute_mapping=False)
        return
    untie(model, [p for pair in pairs for p in pair])
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    if model.all_tied_weights_keys:
        what = f"{label}: merging gives {', '.join(model.all_tied_weights_keys)} weights of their own"
        raise ModelError(
            f"{what}, which {type(model).__name__} cannot have.", "Use the adapter unmerged, with plain peft."
        )


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Silence what peft warns of and what is dealt with here: tied weights, embeddings, weights without a place."""
    known = (
        "Model has `tie_word_embeddings=True`",
        "Model with `tie_word_embeddings=True`",
        "Found missing adapter keys",
    )
    with warnings.catch_warnings():
        for start in (
            *known,
            "Input and output embeddings are no longer tied",
            "Setting `save_embedding_layers` to `True`",
        ):
            warnings.filterwarnings("ignore", f"(?s){re.escape(start)}")
        yield
