"""Entity tracking: does the tuned model still find which thing is where, and which layer's attention lost it?

    The apple is in Box F, the computer is in Box Q, ... Box Q contains the -> computer      chance 1 / boxes
    score of a prompt: the probability of the right thing's first token among those of all things in the prompt
    for each layer l: run the tuned model with the base's attention output of layer l at the last token in the place of
    its own, and see how much of the loss comes back

The task and the idea of putting activations of one model into the other at the same place are of Prakash et al., ICLR
2024 (2402.14811), read in abstract. They find the circuit by path patching and patch its heads (CMAP); here it is one
layer's whole attention output at the last token, so it tells a layer and no circuit. Their number of boxes (7) was not
verified; 4 boxes and 16 prompts are ours, and so is the rule: the score fell (paired interval below 0), and of the
layers the one that brings back most is named with its paired interval, at a level shared out over the layers.

Cost: one forward of each model, and one more for each layer, on 16 prompts of about 40 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.data.encoder import Encoder
from holdfast.diagnose import NOTHING, Case, Finding
from holdfast.diagnose._pair import blocks, evaluating, label, state_out, watching
from holdfast.errors import ModelError
from holdfast.measure import stats

BOXES, PROMPTS = 4, 16  # ours
THINGS = tuple(
    "apple ball cup drum egg fish globe hat ink jar key lamp map nail orange pen quilt ring shoe train umbrella vase"
    " watch yarn".split()
)
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
Outputs = Mapping[int, torch.Tensor]  # layer -> (D,) attention output at the last token


@dataclass(frozen=True)
class Question:
    """ids: tokens of the prompt; options: first token of each thing in it, the right one at `right`."""

    text: str
    ids: list[int]
    options: list[int]
    right: int


def questions(tokenizer: Any, number: int = PROMPTS, boxes: int = BOXES, seed: int = 0) -> list[Question]:
    """Prompts whose things begin with different tokens.

    Raises:
        ModelError: the tokenizer tells too few of the things apart by their first token.
    """
    encoder, draw, first = Encoder(tokenizer), random.Random(f"entities/{seed}"), {}
    for thing, ids in zip(THINGS, encoder.bare([f" {t}" for t in THINGS]), strict=True):
        first.setdefault(_telling(tokenizer, ids), thing)
    first.pop(None, None)
    if len(first) < boxes:
        raise ModelError("The tokenizer begins too many words with the same token.", "Leave this diagnosis out.")
    out = []
    for _ in range(number):
        options, letters = draw.sample(sorted(first), boxes), draw.sample(LETTERS, boxes)
        right = draw.randrange(boxes)
        said = ", ".join(f"the {first[o]} is in Box {x}" for o, x in zip(options, letters, strict=True))
        text = f"{said[0].upper()}{said[1:]}. Box {letters[right]} contains the"
        out.append(Question(text, encoder.prompts([text])[0], options, right))
    return out


def _telling(tokenizer: Any, ids: Sequence[int]) -> int | None:
    """The first token of a word, unless it is a blank alone, which begins every word."""
    return ids[0] if tokenizer.decode([ids[0]]).strip() else None


def attention_of(layer: torch.nn.Module) -> torch.nn.Module:
    """The attention inside a decoder layer.

    Raises:
        ModelError: no part of it has such a name.
    """
    for name, part in layer.named_children():
        if ("attn" in name or "attention" in name) and "norm" not in name:
            return part
    raise ModelError(f"A {type(layer).__name__} has no part that is named as attention.", "Leave this diagnosis out.")


def hooked(model: Any, hook: Any) -> Any:
    """Call hook(layer, output) behind each layer's attention; what it returns, if anything, is the output."""
    return watching(map(attention_of, blocks(model)[1]), lambda n, _args, _kwargs, out: hook(n, out))


def run(model: Any, question: Question, put: Outputs | None = None) -> tuple[float, Outputs]:
    """(probability of the right thing among the options, attention outputs at the last token of every layer).

    put: outputs of some layers that stand in the place of the model's own.
    """
    seen: dict[int, torch.Tensor] = {}

    def hook(n: int, out: Any) -> Any:
        state = state_out(out)
        seen[n] = state[0, -1].detach().clone()
        if put is None or n not in put:
            return None
        new = state.clone()
        new[0, -1] = put[n].to(new)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    device = next(model.parameters()).device
    with hooked(model, hook):
        logits = model(input_ids=torch.tensor([question.ids], device=device), use_cache=False).logits[0, -1]
    return float(logits.float()[question.options].softmax(-1)[question.right]), seen


def patched(base: Any, tuned: Any, asked: Sequence[Question]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (N,) of base and tuned, and (N, L) of the tuned model with one layer's attention of the base."""
    before, after, mixed = [], [], []
    for q in asked:
        score, donor = run(base, q)
        before.append(score)
        after.append(run(tuned, q)[0])
        mixed.append([run(tuned, q, {n: donor[n]})[0] for n in sorted(donor)])
    return np.array(before), np.array(after), np.array(mixed)


def diagnose(case: Case) -> Finding:
    """Ask both models, and the tuned one with the base's attention layer by layer."""
    asked = questions(case.tokenizer, seed=case.seed)
    with evaluating(case.base, case.tuned):
        return told(*patched(case.base, case.tuned, asked), chance=1 / BOXES)


def told(base: np.ndarray, tuned: np.ndarray, mixed: np.ndarray, chance: float) -> Finding:
    """Scores in words."""
    able, fell = stats.mean(base - chance), stats.paired(base, tuned)
    level = 1 - 0.05 / mixed.shape[1]
    back = [stats.paired(tuned, mixed[:, n], level=level) for n in range(mixed.shape[1])]
    best = max(range(len(back)), key=lambda n: back[n].value)
    left = f"{base.mean():.2f} in the base and {tuned.mean():.2f} in the tuned model"
    if able.low <= 0:
        sentence = (
            f"Cannot tell: the base does not track entities above chance ({base.mean():.2f}, chance {chance:g})."
        )
    elif fell.high >= 0:
        sentence = f"{NOTHING}: which thing is where is found as in the base ({left})."
    elif back[best].low > 0:
        sentence = (
            f"The model finds less well which thing is where ({left}). The base's attention of {label(best)} brings"
            f" most back: {back[best].value:+.2f} ({back[best].low:+.2f} to {back[best].high:+.2f})."
        )
    else:
        sentence = f"The model finds less well which thing is where ({left}); no single layer's attention explains it."
    return Finding(
        "entities",
        sentence,
        f"Probability of the right one of the things in {len(base)} prompts, chance {chance:g}; then in the tuned"
        " model with the base's attention output of one layer at the last token. Intervals are corrected for the "
        "number of layers.",
        [["layer", "with the base's attention", "back"]]
        + [[label(n), f"{mixed[:, n].mean():.2f}", f"{e.value:+.2f}"] for n, e in enumerate(back)],
        {"base": float(base.mean()), "tuned": float(tuned.mean()), "back": back[best].value, "layer": float(best)},
    )
