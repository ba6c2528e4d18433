"""Candidates of a repair that look at rows: what each changes is found once, kept in a file, and merged like the rest.

    graft      a `graft` whose mask is trained on the task's rows: the base, and there the tuned model
    realign    alignment recovery (`realign`): the tuned model, and where harmful prompts ask for it the base
    antidote   pruning by harmful rows: the tuned model with zeros; of an adapter, the base and its pruned factors

The task's rows are those of the parts for choosing, with their answers; without rows of the user, prompts with the
tuned model's own answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from holdfast import models
from holdfast.data.rows import read_rows
from holdfast.data.tokens import tokenize_all
from holdfast.engine.pack import TokenRow
from holdfast.errors import DataError, HoldfastError
from holdfast.method import Method, Paper, State
from holdfast.runs.repair_heal import SEED, Healed, write_change
from holdfast.sites.adapter_files import is_plain_lora
from holdfast.sites.merge_files import Pair

GRAFT, REALIGN, ANTIDOTE = "graft", "realign", "antidote"
Settings = Mapping[str, Any]
READS_HARM = frozenset({REALIGN, ANTIDOTE})
ROWS, HARMFUL, MAX_TOKENS = 64, 256, 512  # ours: graft's rows, each ten times forward and back; harmful rows


@dataclass(frozen=True, kw_only=True)
class Masked(Method):
    """One model's weights, and another one's where a mask of a file says so."""

    file: str  # of `write_masks`: a bit an entry
    inside: str  # "base", "tuned" or "zero"
    outside: str  # "base" or "tuned": also for tensors without a mask

    does: ClassVar = "takes few weights from another model, or none"
    paper: ClassVar = Paper("", note="ours")
    needs: ClassVar = frozenset({"base_weights", "dense"})

    def merge(self, name: str, weights: Mapping[str, torch.Tensor], state: State, num_layers: int) -> torch.Tensor:
        bits, outside = _masks(self.file, Path(self.file).stat().st_mtime_ns).get(name), weights[self.outside]
        if bits is None:
            return outside
        mask = torch.from_numpy(np.unpackbits(bits, count=prod(outside.shape)).astype(bool)).view(outside.shape)
        inside = torch.zeros_like(outside) if self.inside == "zero" else weights[self.inside]
        return torch.where(mask.to(outside.device), inside, outside)


@lru_cache(maxsize=1)  # one candidate at a time; another repair may write another file to the same place
def _masks(file: str, written: int) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(file)


def write_masks(masks: Mapping[str, torch.Tensor], target: Path) -> None:
    """Write boolean masks by name, eight entries a byte; whole or not at all."""
    from safetensors.numpy import save_file

    part = target.with_name(f".{target.name}.part")
    save_file({n: np.packbits(m.detach().cpu().numpy().reshape(-1)) for n, m in masks.items()}, part)
    part.replace(target)


def read_harmful(path: str, tokenizer: Any) -> list[TokenRow]:
    """Harmful prompts with their answers, as tokens.

    Raises:
        DataError: the file or a row does not fit.
    """
    try:
        rows = read_rows(path, base_dir=Path.cwd(), tokenizer=tokenizer, notes=[])
    except DataError as e:
        cure = "Name the columns prompt and completion, or write messages." if "data.prompt" in e.cure else e.cure
        raise DataError(e.what, cure) from e
    return tokenize_all(rows, tokenizer, MAX_TOKENS)[:HARMFUL]


def check_pair(methods: Sequence[str], pair: Pair) -> None:
    """Raise HoldfastError where a candidate cannot be made of these models."""
    from holdfast.runs.antidote import any_maps

    tuned, whole = pair.tuned, next((m for m in methods if m in (GRAFT, REALIGN)), None)
    if whole and pair.overlap:
        what = f"{whole} changes a model entry by entry, and the two have tables of other sizes (--overlap)."
        raise HoldfastError(what, f"Leave {whole} out.")
    if ANTIDOTE in methods and tuned.kind == "adapter" and not is_plain_lora(tuned):
        what = f"antidote prunes the factors of plain LoRA, and {tuned.label} is an adapter of another kind."
        raise HoldfastError(what, "Merge it into its base, save the whole and repair that, or leave antidote out.")
    if ANTIDOTE in methods and tuned.kind != "adapter" and not any_maps(pair.like):
        what = f"antidote prunes the query, key and value maps, and {tuned.label} has none by the names q_proj, k_proj"
        raise HoldfastError(f"{what} and v_proj.", "Leave antidote out.")


def made(
    name: str,
    settings: Settings,
    pair: Pair,
    rows: Sequence[TokenRow],
    harmful: Sequence[TokenRow],
    file: Path,
) -> Method:
    """The change of a candidate, found if `file` does not have it yet. Loads models of its own.

    Args:
        name, settings: of the candidate.
        rows: of the task; harmful: of `read_harmful`.

    Raises:
        DataError: too few rows.
    """
    if name == ANTIDOTE and pair.tuned.kind == "adapter":
        if not file.exists():
            write_change(_pruned(pair, harmful, settings), file)
        return Healed(file=str(file), on="base")
    if not file.exists():
        write_masks(_FOUND[name](pair, rows, harmful, settings), file)
    return Masked(file=str(file), **_ENDS[name])


def _graft(pair: Pair, rows: Sequence[TokenRow], _: Any, settings: Settings) -> Mapping[str, torch.Tensor]:
    from holdfast.runs import graft

    how: dict[str, Any] = {"dtype": "float32", "merge_adapter": True}
    after = {n: p.detach() for n, p in models.load(pair.tuned, **how)[0].named_parameters()}
    return graft.train(models.load(pair.base, **how)[0], after, rows[:ROWS], **settings).masks


def _realign(
    pair: Pair, rows: Sequence[TokenRow], harmful: Sequence[TokenRow], settings: Settings
) -> Mapping[str, torch.Tensor]:
    from holdfast.runs.realign import PROMPTS, Recovery, answered, recover

    if len(rows) < 2:
        raise DataError("realign has fewer than two rows of the task.", "Give more, or leave it out.")
    model, before = (models.load(m, merge_adapter=True)[0] for m in (pair.tuned, pair.base))
    half = len(rows) // 2  # one half gives the direction, the other the score
    own, judged = rows[:half][:PROMPTS], rows[half:]
    how = Recovery(**settings)
    return recover(model, before, harmful, own, lambda m: answered(m, judged), recovery=how).chosen.masks


def _antidote(pair: Pair, _: Any, harmful: Sequence[TokenRow], settings: Settings) -> dict[str, torch.Tensor]:
    from holdfast.runs import antidote

    model = _pruned(pair, harmful, settings)
    return {f"{n}.weight": m.weight == 0 for n, m in antidote.maps_of(model, antidote.TARGETS).items()}


def _pruned(pair: Pair, harmful: Sequence[TokenRow], settings: Settings) -> Any:
    from holdfast.runs import antidote

    model = models.load(pair.tuned)[0]
    antidote.prune(model, [r.ids.tolist() for r in harmful], seed=SEED, **settings)
    return model


_FOUND = {GRAFT: _graft, REALIGN: _realign, ANTIDOTE: _antidote}
_ENDS: dict[str, dict[str, str]] = {
    GRAFT: {"inside": "tuned", "outside": "base"},
    REALIGN: {"inside": "base", "outside": "tuned"},
    ANTIDOTE: {"inside": "zero", "outside": "tuned"},
}
