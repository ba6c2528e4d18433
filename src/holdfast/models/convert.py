"""GGUF files, turned into safetensors folders in the cache, once."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError, pip_install
from holdfast.files import cache_dir, fresh_folder, no_bars, read_json, safe_name
from holdfast.models.identity import WEIGHTS, file_sha, stream_sha, write_record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FORMAT = 1  # of converted folders; raise it when the conversion changes, and old ones are made anew
FLOAT32_LIMIT_BYTES = 1_000_000_000  # ours: above it an inexact GGUF is stored as bfloat16
# `tokenizer.ggml.pre` values that cut every digit off before the GPT-2 pattern; transformers ignores them
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

log = logging.getLogger("holdfast")


def convert_gguf(gguf: Path, name: str, *, package: str | None = None, verify: bool = False) -> Path:
    """Turn a GGUF file into a safetensors folder in the cache, once, and return the folder.

    The weights are stored in a dtype that loses nothing against the dequantised ones; only a model over 1 GB
    in float32 falls back to bfloat16, with a warning. `holdfast.json` in the folder records dtype, origin
    and the sha256 of the weights; `verify` compares that in full, otherwise sizes are compared.

    Raises:
        ModelError: not a GGUF file, one that transformers cannot read, or the package gguf is missing.
    """
    try:
        with gguf.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"Cannot read {gguf}: {error.strerror}.", "Check the path.") from error
    if magic != b"GGUF":
        raise ModelError(
            f"{gguf} is not a GGUF file: it starts with {magic!r}.", "Download it again, or name a folder."
        )
    sha, folder = file_sha(gguf), converted_folder(name, gguf)
    if is_converted(folder, sha, verify):
        return folder
    _may_convert(gguf, name, package)
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or of an older format
    log.info("converting %s to safetensors, once", gguf.name)
    with fresh_folder(folder, replace=False) as part:
        try:
            record = _convert(gguf, part)
        except Exception as error:
            what = f"transformers cannot convert {gguf}: {type(error).__name__}: {error}"
            raise ModelError(what, "Use the safetensors version of this model.") from error
        origin = {"source": gguf.name, "source_sha256": sha, "package": _package_version(package)}
        files = {f.name: {"size": f.stat().st_size, "sha256": stream_sha(f)} for f in part.glob(WEIGHTS)}
        write_record(part / "holdfast.json", {"format": FORMAT, **origin, **record, "files": files})
    return folder


def _may_convert(gguf: Path, name: str, package: str | None) -> None:
    """Raise ModelError where the reader of GGUF files, which few need, is not installed."""
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        what = f"{name} comes as a GGUF file in the package {package}" if package else f"{gguf} is a GGUF file"
        need = f"{what}, and reading those needs the package gguf, which cannot be imported ({error})."
        raise ModelError(need, f"Run: {pip_install('gguf')}, or name a safetensors version of the model.") from error


def converted_folder(name: str, gguf: Path) -> Path:
    return cache_dir() / "models" / f"{safe_name(name)}-{file_sha(gguf)[:12]}"


def _package_version(package: str | None) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return package and f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def is_converted(folder: Path, source_sha: str, verify: bool) -> bool:
    """Whether `folder` holds a whole conversion of this source, by our current format."""
    record = read_json(folder / "holdfast.json")
    if record.get("format") != FORMAT or record.get("source_sha256") != source_sha or not record.get("files"):
        return False
    for name, want in record["files"].items():
        file = folder / name
        if not want.get("sha256") or not file.is_file() or file.stat().st_size != want.get("size"):
            return False
        if verify and stream_sha(file) != want["sha256"]:
            return False
    return True


def _convert(gguf: Path, folder: Path) -> dict[str, Any]:
    """Write model and tokenizer of a GGUF into `folder`; return what holdfast.json says about it."""
    import torch
    import transformers

    with no_bars():
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        _follow_metadata(tokenizer, gguf)
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        dtype, exact = _exact_dtype(model)
        if not exact:
            warnings.warn(
                f"{gguf.name} is stored as bfloat16, which rounds its weights: float32 passes 1 GB.",
                stacklevel=2,
            )
        fresh = _without_quantisation(model, dtype)
        ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
        fresh.generation_config = transformers.GenerationConfig(**ids)
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "exact": exact,
        "transformers": transformers.__version__,
    }


def _exact_dtype(model: torch.nn.Module) -> tuple[torch.dtype, bool]:
    """The smallest dtype that holds every weight exactly, True; or bfloat16, False for a large model."""
    import torch

    tensors = list({t.data_ptr(): t for t in model.state_dict().values()}.values())
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(t.to(dtype).to(t.dtype), t) for t in tensors):
            return dtype, True
    small = sum(t.numel() * 4 for t in tensors) < FLOAT32_LIMIT_BYTES
    return (torch.float32, True) if small else (torch.bfloat16, False)


def _without_quantisation(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a plain model: transformers refuses to save one that came from GGUF."""
    import torch

    drop = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in drop}
    with torch.device("meta"):
        fresh = type(model)(type(model.config).from_dict(settings))
    fresh.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()}, assign=True)
    fresh.tie_weights()
    return fresh


def _follow_metadata(tokenizer: PreTrainedTokenizerFast, gguf: Path) -> None:
    """Give the tokenizer the special tokens, chat template and digit splitting that the GGUF states."""
    import gguf as reader_library
    from tokenizers import pre_tokenizers

    fields = reader_library.GGUFReader(gguf).fields
    meta = {k: v.contents() for k, v in fields.items() if k.startswith("tokenizer.") and len(v.data) == 1}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for short, long in keys.items():
        index = meta.get(f"tokenizer.ggml.{long}_token_id")
        if index is not None:
            setattr(tokenizer, f"{short}_token", tokenizer.convert_ids_to_tokens(int(index)))
    if "tokenizer.chat_template" in meta:
        tokenizer.chat_template = meta["tokenizer.chat_template"]
    if meta.get("tokenizer.ggml.pre") in DIGIT_SPLITS:
        # without it a blank line before a number becomes other tokens than the model was trained on
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
