"""An old adapter on a new base: PortLLM (Khan et al., ICLR 2025, arXiv 2410.10870; read in abstract and summaries).

    theta'_task = theta' + B A      theta' the new base, B A what was trained on the old one; nothing is trained

PEFT loads an adapter on whatever base it is told, and knows the one it was trained on by name only. Here the new base
must descend from the old one, what does not carry over is refused, and both identities are written down. The smaller
the new base's own change, the less is lost; how large it is on the adapted weights is returned. Measure what it came
to: `holdfast check NEW_BASE OUT`.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from holdfast import models
from holdfast.errors import ModelError
from holdfast.files import fresh_folder, read_json
from holdfast.models.source import ModelSource
from holdfast.models.tensors import Adapted
from holdfast.sites.adapter_files import CONFIG, WEIGHTS
from holdfast.sites.merge_files import Pair

PORTED = "ported.json"
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")  # starts of LoRA that leave the base's weights alone


def port(adapter: str, new_base: str, out: Path, *, replace: bool = False) -> dict[str, Any]:
    """Write `adapter` into the folder `out` as an adapter on `new_base`; returns what stands in its ported.json.

    replace: an older `out` gives way.

    Raises:
        ModelError: not an adapter of plain LoRA, it changes more than single weights of its base, or `new_base` does
            not descend from the base it was trained on (other shapes, another vocabulary, unrelated weights).
    """
    source, target = models.resolve(adapter), models.resolve(new_base)
    _may_port(source, target)
    assert source.base is not None
    pair = Pair(source.base, target)
    layers = Adapted(source, pair.like).names
    said = {
        "adapter": {"name": source.name, "sha": source.sha},
        "trained on": _named(source.base),
        "moved to": _named(target),
        "drift": {name: _drift(pair, name) for name in layers},
    }
    config = read_json(Path(source.path) / CONFIG)
    config |= {"base_model_name_or_path": target.loadable, "revision": target.revision}
    with fresh_folder(out.expanduser().resolve(), replace=replace) as part:
        for file in Path(source.path).iterdir():
            if file.is_file() and (file.name == WEIGHTS or file.suffix in (".json", ".jinja", ".model", ".txt")):
                shutil.copyfile(file, part / file.name)
        for name, content in ((CONFIG, config), (PORTED, said)):
            (part / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return said


def _may_port(source: ModelSource, target: ModelSource) -> None:
    for wrong, what in (
        (source.kind != "adapter", f"{source.label} is not an adapter."),
        (target.base is not None, f"{target.label} is no whole model."),
    ):
        if wrong:
            raise ModelError(what, "Give an adapter and a whole model, in this order.")
    config = read_json(Path(source.path) / CONFIG)
    start = config.get("init_lora_weights", True)
    for wrong, why in (
        (config.get("peft_type") != "LORA", f"it is of the kind {config.get('peft_type')}"),
        (config.get("use_dora"), "the magnitudes of DoRA belong to the old base's weights"),
        (start not in KEEPS_BASE, f"its start {start!r} changed the base that it was trained on"),
    ):
        if wrong:
            raise ModelError(f"{source.label} cannot be moved to another base: {why}.", "Train it on the new base.")


def _drift(pair: Pair, name: str) -> float:
    """||theta' - theta|| / ||theta|| of one weight."""
    old, new = pair.base_weights[name].float(), pair.tuned_weights[name].float()
    size = float(old.norm())
    return float((new - old).norm()) / size if size else math.inf


def _named(source: ModelSource) -> dict[str, Any]:
    return {"name": source.name, "revision": source.revision, "sha": source.sha}
