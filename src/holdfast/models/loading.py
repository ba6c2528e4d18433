"""Load a model and its tokenizer from local safetensors, or say in one sentence why that cannot be done right."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError
from holdfast.files import no_bars
from holdfast.models import loadable
from holdfast.models.identity import TOKENIZER_FILES
from holdfast.models.merging import merged, peft_quiet, untie
from holdfast.models.place import device_for, dtype_for, four_bits, is_packed, may_load_in_4bit
from holdfast.models.source import ModelSource, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    source: ModelSource | str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    merge_adapter: bool = False,
    load_in_4bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from safetensors, in eval mode, without asking the network.

    Args:
        source: a source, or a name for `resolve`.
        dtype: a torch dtype or its name; 'auto' is bfloat16 where the hardware computes in it, else float32.
        device: a torch device; 'auto' is the first accelerator, else the CPU.
        trust_remote_code: let Python code inside the model's folder run; warns loudly.
        attn_implementation: passed to transformers.
        revision: of a hub id, only together with a name.
        merge_adapter: fold an adapter into its base (see `merged`); otherwise, and on a quantised base, it comes as a
            frozen PeftModel.
        load_in_4bit: keep the linear layers in 4 bits (bitsandbytes); only what lies beside them can then be tuned.

    Raises:
        ModelError: it cannot be found or loaded, or weights are missing from its files; no 4 bits on this machine; an
            adapter that does not belong to its base, or whose base would compute something else with it merged.
    """
    from holdfast.engine.trial import packs
    from holdfast.engine.ways import ask

    if isinstance(source, str):
        source = resolve(source, revision)
    elif revision is not None and revision != source.revision:
        raise ModelError(
            f"{source.label} was resolved without revision {revision!r}.", "Give the revision to resolve."
        )
    _may_be_plain(source)
    if trust_remote_code:
        warnings.warn(f"trust_remote_code: Python code of {source.name} runs with your rights.", stacklevel=2)
    place = device_for(device)
    options = {"dtype": dtype_for(dtype, place), "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    packed = loadable.quantisation(source)
    if load_in_4bit:
        _may_pack(source, packed, place, merge_adapter)
        options |= four_bits(options["dtype"], place)
    elif packed is not None:
        options["device_map"] = {"": place}  # its weights are laid out for where they work, and are not moved later
    with no_bars():
        tokenizer = load_tokenizer(source, trust_remote_code)
        how = _Loading(options, place, _num_tokens(source, tokenizer, trust_remote_code))
        _may_load(source, how)
        model = _load_any(source, how, merge_adapter)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        what = f"{source.label}: its tokenizer has {len(tokenizer)} tokens, its model only {rows} rows for them."
        raise ModelError(what, "Use the tokenizer the model was trained with.")
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    if attn_implementation is not None:
        ask(model, attn_implementation)
    packs(model.eval())  # tries the model, and refuses one that is not causal
    return model, tokenizer


def _may_be_plain(source: ModelSource) -> None:
    """Raise ModelError where a folder with replaced modules is the model or lies below it."""
    if source.kind == "replaced":
        what = f"{source.label} holds replaced modules, which plain transformers and peft do not know."
        raise ModelError(what, f'Load it with holdfast.load("{source.name}").')
    if source.base is not None:
        _may_be_plain(source.base)


@dataclass(frozen=True)
class _Loading:
    """How one `load` goes about: what from_pretrained gets, where weights go, tokens of each adapter's tokenizer."""

    options: dict[str, Any]
    place: torch.device
    num_tokens: dict[str, int]  # path of an adapter -> size of the tokenizer that goes with it


def _num_tokens(source: ModelSource, tokenizer: Any, trust_remote_code: bool) -> dict[str, int]:
    found = {source.path: len(tokenizer)}
    while (source := source.base or source).base is not None:
        found[source.path] = len(load_tokenizer(source, trust_remote_code))
    return found


def _may_load(source: ModelSource, how: _Loading) -> None:
    """Raise ModelError for what files and configurations already show cannot be loaded right."""
    if source.base is None:
        loadable.may_unpack(source)
        return
    _may_load(source.base, how)
    loadable.may_adapt(source)
    base = loadable.skeleton(source, how.options["trust_remote_code"])
    if base is None:
        return
    loadable.may_fit(source, base)
    if source.base.base is None:  # a base that is an adapter may have another vocabulary than the model below
        loadable.rows_of(source, base, how.num_tokens[source.path])


def _may_pack(source: ModelSource, packed: Any, place: torch.device, merge_adapter: bool) -> None:
    """Raise ModelError where load_in_4bit cannot do what it says."""
    may_load_in_4bit(place)
    if packed is not None and loadable.method_of(packed) != "bitsandbytes":
        what = (
            f"{source.label} is quantised with {loadable.method_of(packed)} already: load_in_4bit has nothing to do."
        )
        raise ModelError(what, "Remove load_in_4bit, or name the unquantised model.")
    below = source.base if source.kind == "adapter" and not merge_adapter else source
    if below is not None and below.kind == "adapter":
        what = f"{below.label} is an adapter to be merged, which load_in_4bit would round to 4 bits."
        raise ModelError(what, "Merge it into the unquantised base and save that, then load it in 4 bits.")


def read_config(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """The configuration of the model (of an adapter's base), without its weights."""
    from transformers import AutoConfig

    while source.base is not None:
        source = source.base
    try:
        return AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("configuration", source, error) from error


def context_length(source: ModelSource, trust_remote_code: bool = False) -> int:
    """Positions a model reads, from its configuration alone; a huge number where it names none."""
    try:
        config = read_config(source, trust_remote_code)
    except ModelError:
        return 1 << 20  # loading the weights explains what is wrong
    config = getattr(config, "text_config", None) or config
    return getattr(config, "max_position_embeddings", None) or 1 << 20


def load_tokenizer(source: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, or the base's for an adapter that brings none; padding falls back to eos."""
    from transformers import AutoTokenizer

    has_own = any((Path(source.path) / f).is_file() for f in ("tokenizer_config.json", *TOKENIZER_FILES))
    if source.base is not None and not has_own:
        return load_tokenizer(source.base, trust_remote_code)
    if not has_own:
        raise ModelError(f"{source.label} has no tokenizer in {source.path}.", "Copy the tokenizer's files there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _cannot_load("tokenizer", source, error) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {source.label} has neither pad nor eos token.", "Set one and save it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_any(source: ModelSource, how: _Loading, merge_adapter: bool) -> Any:
    try:
        if source.base is None:
            return _load_full(source, how)
        base = _load_any(source.base, how, merge_adapter=True)  # an adapter on an adapter needs it merged
        if hasattr(base, "peft_config"):
            what = (
                f"{source.base.label} is an adapter on quantised weights, so {source.name} cannot be put on top of it."
            )
            raise ModelError(what, "Name the unquantised model as the base of the lower adapter.")
        model = _adapted(base, source, how.num_tokens[source.path])
        if not merge_adapter or is_packed(base):
            return model
        plain = merged(model, source.label)
        plain.name_or_path = plain.config.name_or_path = source.path
        return plain
    except ModelError:
        raise
    except Exception as error:
        raise _cannot_load("model", source, error) from error


def _adapted(base: Any, source: ModelSource, num_tokens: int) -> Any:
    """The adapter of `source` on its loaded base, as a frozen PeftModel with every weight of its file in its place."""
    from peft import PeftModel

    rows = loadable.rows_of(source, base, num_tokens)
    if rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter brings the new ones
    if loadable.has_two_heads(source, base):
        untie(base, base.get_input_embeddings().parameters())
    renames = getattr(base, "_checkpoint_conversion_mapping", {})
    with peft_quiet():
        model = PeftModel.from_pretrained(base, source.path, is_trainable=False)
        found = model.load_adapter(
            source.path, "default", is_trainable=False, key_mapping=renames
        )  # it says what it did
    ends = tuple(f"{n}." for n in loadable.embedding_names(base).values())
    strange = [k for k in found.unexpected_keys if not k.removeprefix(loadable.PREFIX).startswith(ends)]
    for names, what in ((strange, "which its base has no place for"), (found.missing_keys, "which its file lacks")):
        if names:
            what = f"Adapter {source.label}: {len(names)} weights, first {sorted(names)[0]}, {what}."
            raise ModelError(
                what, "It was made for another base or task, or is damaged: correct its adapter_config.json."
            )
    return model


def _load_full(source: ModelSource, how: _Loading) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  (a pair, if asked)
        source.path, use_safetensors=True, local_files_only=True, output_loading_info=True, **how.options
    )
    if info["missing_keys"]:  # transformers would fill them with noise
        missing = sorted(info["missing_keys"])
        what = f"{source.label} lacks {len(missing)} weights, first {missing[0]}."
        raise ModelError(what, "It is damaged, or not a causal language model.")
    model.name_or_path = model.config.name_or_path = source.loadable  # peft writes it into adapters
    # packed weights lie where they belong already, and transformers refuses to move them
    return model if "device_map" in how.options else model.to(how.place)  # pyright: ignore[reportArgumentType]


def _cannot_load(thing: str, source: ModelSource, error: Exception) -> ModelError:
    text = " ".join(str(error).split())[:300]
    cure = "Check that the folder is whole and that transformers knows its architecture."
    if source.base is not None:
        cure = (
            f"Check that {Path(source.path) / 'adapter_config.json'} fits the weights beside it and the base it names."
        )
    packed = loadable.quantisation(source)
    if packed is not None:
        cure = f"It is quantised with {loadable.method_of(packed)}. " + loadable.unpack_cure(
            loadable.method_of(packed), error
        )
    if "trust_remote_code" in text:
        cure = "It needs its own Python code: read that code, then set trust_remote_code."
    return ModelError(f"Cannot load the {thing} of {source.label}: {type(error).__name__}: {text}", cure)
