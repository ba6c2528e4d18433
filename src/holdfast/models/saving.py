"""Write a model that plain transformers or peft loads (or `holdfast.load`, with replaced modules); all or nothing."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError
from holdfast.files import fresh_folder, no_bars, read_json
from holdfast.models.identity import REPLACED, REPLACED_STATE, REPLACED_WEIGHTS, write_record
from holdfast.models.merging import peft_quiet
from holdfast.models.source import ModelSource, is_model, resolve
from holdfast.versions import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
SAVED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, card: str | None) -> Path:
    """Export to safetensors that plain transformers (or peft, for a PeftModel) loads; all or nothing.

    A model with replaced modules becomes a folder for `holdfast.load`, which names its base (`save_replaced`).

    An older model in `folder` is replaced. `card` becomes README.md.

    Raises:
        ModelError: `folder` holds more than an older model, or is the base of this adapter.
    """
    from holdfast.engine.replaced import replaced_in

    target = Path(folder).expanduser().resolve()
    may_replace(model, target)
    with fresh_folder(target, replace=True) as part, no_bars():
        _mend_generation(model, tokenizer)
        if hasattr(model, "peft_config"):
            _save_adapter(model, part)
        elif replaced_in(model):
            if not save_replaced(model, part):
                warnings.warn("The base of this model has no name: holdfast.load needs one.", stacklevel=2)
        else:
            model.save_pretrained(part)
        prompting(tokenizer).save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # peft writes an empty form
        if card is not None:
            (part / "README.md").write_text(card, encoding="utf-8")
    return target


def name_after(model: Any, folder: Path) -> None:
    """Let adapters that are put on a model from now on name `folder`, which holds it, as their base."""
    model.name_or_path = model.config.name_or_path = str(folder.expanduser().resolve())


def may_replace(model: Any, target: Path) -> None:
    """Raise ModelError if writing `target` would destroy something else than an older model."""
    cure = "Choose another folder."
    for base in _bases(model):
        if base and Path(base).expanduser().resolve() == target:
            raise ModelError(f"{target} holds the base of this adapter: it is not replaced.", cure)
    if target.is_file():
        raise ModelError(f"{target} is a file: it is not replaced.", cure)
    entries = list(target.iterdir()) if target.is_dir() else []
    strange = [e.name for e in entries if e.is_dir() or e.suffix not in SAVED_SUFFIXES]
    if entries and (strange or not is_model(target)):
        raise ModelError(f"{target} is not only a model ({(strange or ['no config.json'])[0]}).", cure)


def _bases(model: Any) -> list[Any]:
    """The names of what lies below the adapters or the replaced modules of a model."""
    adapters = getattr(model, "peft_config", {}).values()
    if model is None or adapters:
        return [config.base_model_name_or_path for config in adapters]
    from holdfast.engine.replaced import origin_of, replaced_in

    return [origin_of(model).base] if replaced_in(model) else []


def prompting(tokenizer: Any) -> Any:
    """The tokenizer as inference needs it: one that ends every text by itself, prompts too, no longer does.

    Answers are trained behind prompts without an end; `tokenizer(prompt)` must give those tokens.
    """
    from tokenizers import processors

    from holdfast.data.encoder import Encoder

    encoder = Encoder(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not encoder.ends_texts or backend is None:
        return tokenizer
    fresh = copy.deepcopy(tokenizer)
    names = [str(n) for n in tokenizer.convert_ids_to_tokens(encoder.begin)]
    pieces = list(zip(names, encoder.begin, strict=True))
    single, pair = " ".join([*names, "$A"]), " ".join([*names, "$A", "$B"])
    fresh.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=pieces
    )
    for key in ("add_eos_token", "_add_eos_token"):  # some classes make their processor anew from it
        if getattr(fresh, key, None):
            setattr(fresh, key, False)
    return fresh


def _mend_generation(model: Any, tokenizer: Any) -> None:
    """Generation must stop where answers were trained to end. Some hub models carry sampling values with sampling off,
    which transformers refuses to save: what has no effect goes, so that greedy models stay greedy."""
    from holdfast.data.encoder import ends_to_set

    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    if (ends := ends_to_set(generation, tokenizer)) is not None:
        generation.eos_token_id = ends
    try:
        generation.validate(strict=True)
    except ValueError:
        for name in SAMPLING:
            setattr(generation, name, None)


def _save_adapter(model: Any, folder: Path) -> None:
    """Save the active adapter, pointing to a base that loads without Holdfast.

    During the save the base is named by its local folder, or peft would ask the hub for its configuration.

    Raises:
        ModelError: the base is another adapter, which plain peft would leave out.
    """
    active = model.active_adapter
    config = model.peft_config[active]
    name = config.base_model_name_or_path
    base = _known(name)
    if base is not None and base.kind == "adapter":
        what = f"This adapter was trained on {base.label}, merged, and plain peft would load it without {base.name}."
        raise ModelError(
            what,
            "Save the merged base, load that and train on it; or merge this adapter too and save the whole.",
        )
    if base is None:
        warnings.warn(f"The adapter's base {name!r} cannot be found: plain peft needs it given.", stacklevel=3)
    config.base_model_name_or_path = base.path if base else name
    try:
        with peft_quiet():
            model.save_pretrained(folder, selected_adapters=[active])
    finally:
        config.base_model_name_or_path = name
    for file in (folder / active).glob("*"):  # peft puts any adapter but 'default' one level down
        file.rename(folder / file.name)
    shutil.rmtree(folder / active, ignore_errors=True)
    written = read_json(folder / "adapter_config.json")
    named = {"base_model_name_or_path": base.loadable, "revision": base.revision} if base else {}
    write_record(folder / "adapter_config.json", written | named)


def _known(name: str | None) -> ModelSource | None:
    """The model of that name, or None."""
    try:
        return resolve(name) if name else None
    except ModelError:
        return None


def save_replaced(model: Any, folder: Path) -> bool:
    """Write what the replaced modules of a model hold beside their originals, and what they are made of on which base.

    There is no config.json, and no file of weights that plain transformers would look for. Returns whether the base
    was found; without it the folder serves as a checkpoint, but cannot be loaded.
    """
    from safetensors.torch import save_file

    from holdfast.engine.replaced import origin_of, own_tensors, replaced_in

    origin = origin_of(model)
    base = _known(origin.base)
    tensors = own_tensors(model) | {REPLACED_STATE + k: v for k, v in origin.state.items()}
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, folder / REPLACED_WEIGHTS)
    said = {"name": base.loadable, "revision": base.revision, "sha": base.sha} if base else {"name": origin.base}
    names = list(replaced_in(model))
    record = {"method": origin.method, "settings": origin.settings, "seed": origin.seed, "modules": names}
    write_record(folder / REPLACED, {"holdfast": __version__, **record, "base": said})
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    return base is not None
