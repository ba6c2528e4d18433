"""What a model is: the identity of its content, by which two runs know that they began with the same weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.files import cache_dir, read_json

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
OTHERS = ("*.model", "*.tiktoken", "vocab.txt", "added_tokens.json")  # of a tokenizer without a tokenizer.json
CODE = "*.py"  # that comes with a model whose configuration names it
TOKENIZER_KEYS = ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token",
                  "add_eos_token", "add_prefix_space")  # fmt: skip
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "base_model_name_or_path", "peft_version")
MERGING = 2  # how adapters are folded in; raise it when that changes, and what was measured is measured anew
WEIGHTS = "*.safetensors"
# a folder with replaced modules: what they are and on which base, their tensors, and what names of method state begin
# with; plain transformers finds neither a configuration nor weights there
REPLACED, REPLACED_WEIGHTS, REPLACED_STATE = "replaced.json", "replaced.safetensors", "state/"


def stream_sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def file_sha(path: Path) -> str:
    """sha256 of a file. Large ones are remembered by (path, size, mtime); hub blobs have it as name."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    if stat.st_size < 1 << 20:
        return stream_sha(real)
    book, stamp = cache_dir() / "sha.json", [stat.st_size, stat.st_mtime_ns]
    row = read_json(book).get(str(real))
    if isinstance(row, list) and row[:2] == stamp:
        return row[2]
    sha = stream_sha(real)
    # read again: another process may have added rows meanwhile, and a lost row only costs a second hash
    rows = {key: value for key, value in read_json(book).items() if Path(key).exists()}
    write_record(book, rows | {str(real): [*stamp, sha]})
    return sha


def folder_sha(folder: Path, base_sha: str = "") -> str:
    """Identity of a model folder: weights, lasting configuration, tokenizer, and the base's identity."""
    parts: dict[str, Any] = {"base": base_sha, **({"merging": MERGING} if base_sha else {})}
    for file in sorted(folder.glob(WEIGHTS)):
        parts[file.name] = file_sha(file)
    # generation_config.json says which tokens end an answer
    for name in ("config.json", "adapter_config.json", "generation_config.json"):
        parts[name] = {k: v for k, v in read_json(folder / name).items() if k not in VOLATILE_KEYS}
    if (folder / REPLACED).is_file():  # of its base the content counts, not the name
        parts[REPLACED] = {k: v for k, v in read_json(folder / REPLACED).items() if k not in ("base", "holdfast")}
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            parts[name] = file_sha(folder / name)
    other = [] if (folder / "tokenizer.json").is_file() else [f for pattern in OTHERS for f in folder.glob(pattern)]
    other += folder.glob(CODE) if "auto_map" in parts["config.json"] else []
    for file in sorted(other):
        parts[file.name] = file_sha(file)
    settings = read_json(folder / "tokenizer_config.json")
    parts["tokenizer"] = {k: settings[k] for k in TOKENIZER_KEYS if k in settings}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def state_fingerprint(model: torch.nn.Module) -> str:
    """Identity (64 hex digits) of the weights in memory; any changed bit changes it."""
    return tensors_fingerprint(model.state_dict())


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Identity (64 hex digits) of named tensors, whatever their order."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def write_record(path: Path, value: dict) -> None:
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)
