"""Merging a saved adapter without its base: where methods only scale the change, its numbers are scaled, exactly."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from holdfast.files import fresh_folder, read_json
from holdfast.method import Method, canonical
from holdfast.models.source import ModelSource
from holdfast.sites.merging import Merging

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_B = re.compile(r"\.lora_(?:embedding_)?B(?:\.|$)")


def is_plain_lora(adapter: ModelSource) -> bool:
    """Whether the change of a saved adapter is s B A."""
    config = read_json(Path(adapter.path) / CONFIG)
    return config.get("peft_type") == "LORA" and not config.get("use_dora")


def may_scale(adapter: ModelSource, methods: Sequence[Method]) -> bool:
    """Whether `methods` only scale changes, and the change of `adapter` is B A of plain LoRA, which scales with B."""
    return is_plain_lora(adapter) and all(m.scales_update for m in methods)


def scaled(adapter: ModelSource, methods: Sequence[Method], num_layers: int, out: Path, card: str) -> Path:
    """Write `adapter` into the folder `out` with its B scaled as `methods` scale the change; whole or not at all.

    Needs `may_scale`. The configuration and a tokenizer beside it are taken over; an older `out` gives way.
    """
    from safetensors.torch import load_file, save_file

    source, target = Path(adapter.path), out.expanduser().resolve()
    weights = load_file(source / WEIGHTS)
    factors = [(f"{LORA_B.split(canonical(key))[0]}.weight", w) for key, w in weights.items() if LORA_B.search(key)]
    Merging(methods, {m.name: {} for m in methods}, None, num_layers).scale_adapter(factors)
    with fresh_folder(target, replace=True) as part:
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copyfile(file, part / file.name)
        save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
        (part / "README.md").write_text(card, encoding="utf-8")
    return target
