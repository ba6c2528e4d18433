"""What cannot be loaded right, found in configurations and file headers before any weight is read.

Each thing gets its own message: a packed (quantised) checkpoint without its package, an adapter that lives in the
prompt, one made for another base, one whose new embeddings were never saved. `rows_of` also says how many embedding
rows an adapter with a changed vocabulary wants its base to have. Importing this module is cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError
from holdfast.files import read_json

if TYPE_CHECKING:
    from holdfast.models.source import ModelSource

Shapes = Mapping[str, tuple[int, ...]]

PACKAGES = {
    "aqlm": "aqlm[gpu,cpu]",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "fp8": "kernels",
    "gptq": "optimum gptqmodel",
    "hqq": "hqq",
    "mxfp4": "kernels triton",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "torchao": "torchao",
    "vptq": "vptq",
}
# what packers call their tensors; none of them is a weight of a plain causal language model
PACKED = (".qweight", ".weight_packed", ".weight_scale_inv", ".SCB", ".absmax", ".W_q")
PLAIN = "or name the unquantised model"
PREFIX = "base_model.model."


# --- quantised checkpoints --------------------------------------------------------------------------


def quantisation(source: ModelSource) -> dict[str, Any] | None:
    """How the weights of a model (of an adapter's base) are packed, by its config.json; None for plain ones."""
    while source.base is not None:
        source = source.base
    config = read_json(Path(source.path) / "config.json")
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    return found if isinstance(found, dict) else None


def method_of(packed: Mapping[str, Any]) -> str:
    """The name of a packing: 'gptq', 'bitsandbytes', ..."""
    bits = packed.get("load_in_4bit") or packed.get("load_in_8bit")
    return str(packed.get("quant_method") or ("bitsandbytes" if bits else "an unnamed method"))


def may_unpack(source: ModelSource) -> None:
    """Raise ModelError unless transformers can read the weights of this model here."""
    packed = quantisation(source)
    if packed is None:
        _not_packed(source)
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    method = method_of(packed)
    what = f"{source.label} is quantised with {method}"
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if method not in known:
        raise ModelError(f"{what}, which transformers cannot read.", f"Use another version of it, {PLAIN}.")
    try:
        AutoHfQuantizer.from_config(dict(packed), pre_quantized=True).validate_environment(
            device_map=None, weights_only=True
        )
    except Exception as error:  # every quantiser has its own
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"{what}, which does not work here: {text}", unpack_cure(method, error)) from error


def unpack_cure(method: str, error: Exception) -> str:
    """What to do about a packed model that does not load: its package, or other hardware."""
    if isinstance(error, ImportError) and "GPU" not in str(error):
        return f"Run: pip install {PACKAGES.get(method, method)}, {PLAIN}."
    return f"Use a machine and versions it works on, {PLAIN}."


def _not_packed(source: ModelSource) -> None:
    """Raise ModelError for packed weights whose configuration does not say how they were packed."""
    folder = Path(source.path)
    told = read_json(folder / "config.json").get("quantization")  # MLX
    names = read_json(folder / "model.safetensors.index.json").get("weight_map") or _names(folder)
    first = next((n for n in names if n.endswith(PACKED) or (told and n.endswith(".scales"))), None)
    if first is not None:
        what = (
            f"{source.label} holds packed weights ({first}), but its config.json has no quantization_config for them."
        )
        raise ModelError(what, f"Let the tool that packed it write quantization_config, {PLAIN}.")


def _names(folder: Path) -> Iterable[str]:
    return (name for file in sorted(folder.glob("*.safetensors")) for name in shapes(file))


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, from its header alone; {} for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (OSError, SafetensorError):
        return {}  # loading it says what is wrong


# --- adapters -------------------------------------------------------------------------------------


def may_adapt(source: ModelSource) -> None:
    """Raise ModelError for an adapter whose kind cannot become part of its base's weights."""
    from peft import PeftConfig
    from peft.utils import PeftType

    config = read_json(Path(source.path) / "adapter_config.json")
    kind = str(config.get("peft_type"))
    if kind not in set(PeftType):
        what = f"{source.label} is an adapter of type {kind}, which the installed peft does not know."
        raise ModelError(what, "Update peft, or correct peft_type in its adapter_config.json.")
    assert source.base
    cure = f"Measure or tune its base {source.base.name}, or use it with plain peft."
    try:
        parsed: Any = PeftConfig.from_pretrained(source.path)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        what = f"The adapter_config.json of {source.label} is not one of a {kind} adapter: {text}"
        raise ModelError(what, "Save the adapter again with a peft that fits.") from error
    if parsed.is_prompt_learning:
        count = config.get("num_virtual_tokens")
        what = f"{source.label} is an adapter of type {kind}: it puts {count} virtual tokens before every text"
        raise ModelError(f"{what}, which no weight of the base can hold.", cure)
    for key in ("layer_replication", "alora_invocation_tokens"):
        if config.get(key):
            raise ModelError(f"{source.label} uses {key}, which cannot be folded into its base.", cure)
    if kind in ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA"):
        what = f"{source.label} is an adapter of type {kind}, which works beside the weights of its base, not in them."
        raise ModelError(what, cure)


def skeleton(source: ModelSource, trust_remote_code: bool) -> Any:
    """The model below all adapters without weights (on the meta device), or None where it cannot be built so."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    while source.base is not None:
        source = source.base
    if trust_remote_code:  # code of others may not stand a model without weights
        return None
    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:
        return None  # loading it says what is wrong


def may_fit(source: ModelSource, base: Any) -> None:
    """Raise ModelError for a LoRA adapter that was made for another base than `base` (weights are not looked at)."""
    if _renamed(base):
        return  # peft translates names and shapes of such adapters itself
    modules, head = dict(base.named_modules()), base.get_output_embeddings()
    assert source.base
    wrong = f"Correct base_model_name_or_path in {Path(source.path) / 'adapter_config.json'}."
    pair = f"Adapter {source.name} was made for another model than its base {source.base.label}"
    targets = read_json(Path(source.path) / "adapter_config.json").get("target_modules")
    if isinstance(targets, list) and targets and not any(f".{n}".endswith(f".{t}") for n in modules for t in targets):
        has = sorted({n.rsplit(".", 1)[-1] for n, m in modules.items() if getattr(m, "weight", None) is not None})
        what = f"{pair}: it adapts {', '.join(sorted(targets))}, and the base has only {', '.join(has)}."
        raise ModelError(what, wrong)
    for name, shape in shapes(Path(source.path) / "adapter_model.safetensors").items():
        module, part = _split(name)
        if part and _missing_layer(module, modules):
            raise ModelError(f"{pair}: it changes {module}, which the base does not have.", wrong)
        size = _wanted_size(modules.get(module), part)
        if size is not None and size != shape[_SIDE[part]] and modules[module] is not head:  # a vocabulary may grow
            word = {"lora_A": "reads", "lora_B": "gives"}[part]
            what = f"{pair}: at {module} it {word} {shape[_SIDE[part]]} numbers, where the base has {size}."
            raise ModelError(what, wrong)


def _renamed(base: Any) -> bool:
    """Whether transformers keeps this architecture under other names than its checkpoints do."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renames = get_checkpoint_conversion_mapping(base.config.model_type)
    return renames is not None or bool(getattr(base, "_checkpoint_conversion_mapping", None))


_SIDE = {"lora_A": 1, "lora_B": 0}  # the side of A and B that belongs to the base


def _split(name: str) -> tuple[str, str]:
    """'base_model.model.a.b.lora_A.weight' -> ('a.b', 'lora_A')."""
    parts = name.removeprefix(PREFIX).split(".")
    at = next((i for i, p in enumerate(parts) if p in _SIDE), len(parts))
    return ".".join(parts[:at]), parts[at] if at < len(parts) else ""


def _missing_layer(name: str, modules: Mapping[str, Any]) -> bool:
    """Whether `name` stands in a numbered layer that a model of these modules does not have."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
    return at is not None and ".".join(parts[:at]) in modules and ".".join(parts[: at + 1]) not in modules


def _wanted_size(module: Any, part: str) -> int | None:
    """What a plain linear layer reads (A) or gives (B); None for any other module."""
    import torch

    if not isinstance(module, torch.nn.Linear):
        return None
    return module.in_features if part == "lora_A" else module.out_features if part == "lora_B" else None


# --- adapters with a changed vocabulary -----------------------------------------------------------


def rows_of(source: ModelSource, base: Any, num_tokens: int) -> int:
    """The embedding rows that an adapter wants its base to have: those of `base`, unless the vocabulary was changed.

    Args:
        base: the model below it, perhaps without weights.
        num_tokens: size of the tokenizer that goes with the adapter.

    Raises:
        ModelError: rows that the base lacks and the adapter does not bring.
    """
    names = embedding_names(base)
    header = shapes(Path(source.path) / "adapter_model.safetensors")
    has = base.get_input_embeddings().weight.shape[0]
    wants = {kind: _rows(header, name) for kind, name in names.items()}
    seen = {n for n in (*wants.values(), _lora_rows(header, names)) if n}
    if len(seen) > 1:
        what = f"Adapter {source.name} holds embeddings of {' and of '.join(map(str, sorted(seen)))} rows."
        raise ModelError(what, "Save the adapter again.")
    rows = seen.pop() if seen else has
    if rows == has and num_tokens > has and _trains(source, range(has, num_tokens), names, base):
        return num_tokens
    lacks = next((names[k] for k, n in wants.items() if n is None), None)
    if rows > has and lacks and not (is_tied(base) and any(wants.values())):
        what = f"Adapter {source.name} was trained with {rows} tokens, its base has {has}, and it lacks {lacks}."
        raise ModelError(what, "Save it again with save_embedding_layers=True.")
    if num_tokens > rows:
        assert source.base
        what = (
            f"The tokenizer of adapter {source.name} has {num_tokens} tokens, its base {source.base.label} {has} rows"
        )
        cure = "Save the adapter again with save_embedding_layers=True, or with the tokenizer it was trained with."
        raise ModelError(f"{what}, and the adapter does not bring the others.", cure)
    return rows


def embedding_names(base: Any) -> dict[str, str]:
    """Names of the input and output embeddings in the model."""
    by_id = {id(m): n for n, m in base.named_modules()}
    found = {"input": base.get_input_embeddings(), "output": base.get_output_embeddings()}
    return {kind: by_id[id(m)] for kind, m in found.items() if m is not None and id(m) in by_id}


def _rows(header: Shapes, name: str) -> int | None:
    """Rows of a whole embedding that an adapter brings: plain, as a module to save, or below what it trains."""
    for key, shape in header.items():
        own = key.removeprefix(PREFIX)
        if own.startswith(f"{name}.") and own.endswith(".weight") and "lora_" not in own:
            return shape[0]
    return None


def _lora_rows(header: Shapes, names: Mapping[str, str]) -> int | None:
    for kind, part, side in (("input", "lora_embedding_A", 1), ("output", "lora_B.weight", 0)):
        found = header.get(f"{PREFIX}{names.get(kind)}.{part}")
        if found:
            return found[side]
    return None


def _trains(source: ModelSource, new: Iterable[int], names: Mapping[str, str], base: Any) -> bool:
    """Whether an adapter brings its own row for each new token, so that what the base has there does not matter."""
    config = read_json(Path(source.path) / "adapter_config.json")
    found = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(found, list):
        found = {names["input"]: found}
    if not isinstance(found, dict):
        return False
    wanted = ["input"] if is_tied(base) else list(names)
    ends = {name.rsplit(".", 1)[-1]: set(ids) for name, ids in found.items()}
    return all(set(new) <= ends.get(names[k].rsplit(".", 1)[-1], set()) for k in wanted)


def has_two_heads(source: ModelSource, base: Any) -> bool:
    """Whether an adapter brings unlike input and output embeddings for a base that has one weight for both."""
    if not is_tied(base):
        return False
    from safetensors import safe_open

    file = Path(source.path) / "adapter_model.safetensors"
    header, names = shapes(file), embedding_names(base)
    keys = [next((k for k in header if k == f"{PREFIX}{n}.weight"), None) for n in names.values()]
    if None in keys or len(keys) < 2:
        return False
    with safe_open(file, framework="pt") as opened:
        one, other = (opened.get_tensor(k) for k in keys)
    return one.shape != other.shape or not bool((one == other).all())


def is_tied(base: Any) -> bool:
    """Whether input and output embeddings are one weight (on the meta device too)."""
    head = base.get_output_embeddings()
    return head is not None and head.weight is base.get_input_embeddings().weight


def token_ids(adapter: Any) -> list[int]:
    """The ids whose rows an adapter's configuration trains one by one."""
    found = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None) or []
    return sorted({i for ids in found.values() for i in ids} if isinstance(found, dict) else set(found))
