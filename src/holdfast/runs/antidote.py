"""Antidote: after tuning, zero the few weights that answer most strongly to harmful rows.

    X_j   what goes into column j of a linear map, over the tokens of the harmful rows
    h_ij  = |W_ij| * sqrt(mean over rows of sum over tokens of X_j^2)                (Wanda's score)
    of each row i of W the `ratio` of columns with the largest h become 0

Huang et al., ICML 2025 (arXiv 2408.09600), as its released code does it: one shot and no training; the statistics are
of the unpruned model; on a LoRA adapter the factors A and B are pruned, so the base stays to the last bit, and on
whole weights the query, key and value maps. `by` has the controls: the size of the weights alone, and chance.

It hides skills too: whether weights of harm alone exist is doubted (arXiv 2505.14185), so measure the result against
the controls at the same ratio, and both safety and what else it should do. The rows are yours to give: prompts with
harmful answers, of the kind that must not come back.

Cost: one forward a row. A model of packed (quantised) weights is not pruned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast import models
from holdfast.data.rows import read_rows
from holdfast.data.tokens import tokenize_all
from holdfast.engine.inputs import watched
from holdfast.errors import HoldfastError, ModelError

RATIO = 0.1  # the released scripts' dense_ratio
TARGETS = r"\.(q_proj|k_proj|v_proj)$"  # the released code, of whole weights
BY = ("activations", "magnitude", "chance")


def antidote(
    tuned: str,
    harmful: str | Path,
    out: Path,
    *,
    ratio: float = RATIO,
    targets: str = TARGETS,
    by: str = "activations",
    seed: int = 0,
    max_tokens: int = 512,
    **how: Any,
) -> dict[str, float]:
    """Write the pruned model, or adapter, into the folder `out`; returns the share that became 0, by module.

    Args:
        tuned: hub id, folder or adapter.
        harmful: rows of prompts and harmful answers, any file that `data.train` takes.
        targets: a regular expression for names of linear maps; of an adapter those that it adapts are taken.
        how: of `models.load`.

    Raises:
        HoldfastError: values that make no sense, no such maps, no rows.
    """
    model, tokenizer = models.load(tuned, **how)
    rows = tokenize_all(read_rows(harmful, base_dir=Path.cwd(), tokenizer=tokenizer), tokenizer, max_tokens)
    pruned = prune(model, [r.ids.tolist() for r in rows], ratio=ratio, targets=targets, by=by, seed=seed)
    card = f"# A pruned model\n\n{tuned}, pruned by Antidote (ratio {ratio:g}, by {by}) on {len(rows)} rows.\n"
    models.save_model(model, tokenizer, out, card=card)
    return pruned


def prune(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    ratio: float = RATIO,
    targets: str = TARGETS,
    by: str = "activations",
    seed: int = 0,
) -> dict[str, float]:
    """Zero weights of a model in memory, in place; returns the share of each map that is 0 afterwards.

    rows: tokens of harmful prompts with their answers.

    Raises:
        HoldfastError: as `antidote`.
    """
    if not 0 <= ratio <= 1 or by not in BY:
        raise HoldfastError(f"Antidote was asked for a ratio of {ratio} by {by!r}.", f"0 to 1, by {', '.join(BY)}.")
    if not rows:
        raise HoldfastError("Antidote has no harmful rows to look at.", "Give prompts with harmful answers.")
    maps = maps_of(model, targets)
    squares = statistics(model, maps, rows) if by == "activations" else {}
    draw = torch.Generator().manual_seed(seed)
    for name, m in maps.items():
        score = m.weight.detach().float().abs()
        if by == "chance":
            score = torch.rand(score.shape, generator=draw).to(score.device)
        elif by == "activations":
            score = score * squares[name].sqrt()
        with torch.no_grad():
            m.weight.mul_(~largest(score, ratio))
    return {name: float((m.weight == 0).float().mean()) for name, m in maps.items()}


def any_maps(model: Any, targets: str = TARGETS) -> bool:
    """Whether a whole model has maps that `targets` finds."""
    return any(re.search(targets, n) for n, m in model.named_modules() if isinstance(m, nn.Linear))


def maps_of(model: Any, targets: str) -> dict[str, nn.Linear]:
    """The maps to prune by name: an adapter's factors, or those that `targets` finds.

    Raises:
        ModelError: there are none, or they are packed.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if hasattr(model, "peft_config"):
        found = {n: m for n, m in linear.items() if ".lora_A." in n or ".lora_B." in n}
    else:
        found = {n: m for n, m in linear.items() if re.search(targets, n)}
    if not found:
        raise ModelError("Antidote finds no map to prune in this model.", f"Change targets, now {targets!r}.")
    packed = next((n for n, m in found.items() if not m.weight.is_floating_point()), None)
    if packed:
        raise ModelError(f"{packed} holds packed weights, which are not pruned.", "Use the unquantised model.")
    return found


def largest(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """(m, n) bool: of each row all but the int(n (1 - ratio)) smallest; of equal ones the first count as smaller."""
    keep = int(score.shape[1] * (1 - ratio) + 1e-9)
    order = score.sort(dim=1, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, keep:], True)


def statistics(model: Any, maps: dict[str, nn.Linear], rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """(n,) mean over rows of the sum over tokens of the squared inputs of each map, fp32; each row alone, unpadded."""
    sums = {n: torch.zeros(m.in_features, device=m.weight.device) for n, m in maps.items()}
    was_training = model.training
    model.eval()

    def add(name: str, x: torch.Tensor) -> None:
        sums[name].add_(x.detach().float().flatten(0, -2).square().sum(0))

    try:
        with watched(maps, add), torch.no_grad():
            for row in rows:
                model(input_ids=torch.tensor([list(row)], device=next(model.parameters()).device), use_cache=False)
    finally:
        model.train(was_training)
    return {n: s / len(rows) for n, s in sums.items()}
