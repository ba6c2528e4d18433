"""SCALE: a small tuned model's drafts in the few-shot prompt of a large model, which stays as it is.

    prompt = demonstrations (x_i, S(x_i), y_i), then (x, S(x));   the large model writes y
    S        the specialist: one draft of each input, or k, always in its own order

Cheng et al. 2023 (arXiv 2309.17061; its code was not read, its ten demonstrations are unverified). They refine
translations of GPT-4; this is their prompt for any task. A draft is a line of the input, so `data.fewshot` writes the
rest, and without drafts the prompt is the ordinary few-shot prompt. The same S drafts for demonstrations and question:
a gold answer never stands where a draft should. Show it demonstrations that S was not trained on, or its drafts look
better there than they are. The large model copies bad drafts too: `copy_rate` says how often.

Cost: a pass of S over all inputs, and a longer prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.data.fewshot import FORMATS, Format, Pair, Prompt, build
from holdfast.errors import HoldfastError
from holdfast.measure.generate import generate
from holdfast.measure.probe import Probe

Specialist = Callable[[Sequence[str]], Sequence[Sequence[str]]]  # inputs -> the drafts of each, () for none


@dataclass(frozen=True)
class Hinted:
    """A prompt. drafts: of the question, as shown; seed, order: which demonstration (from 0) stands where."""

    prompt: Prompt
    drafts: tuple[str, ...]
    seed: int
    order: tuple[int, ...]


def specialist_hint(
    specialist: Specialist,
    shots: Sequence[Pair],
    queries: Sequence[Pair],
    *,
    seed: int = 0,
    form: Format = FORMATS["io"],
    label: str = "Draft",
    **writing: Any,
) -> list[Hinted]:
    """A prompt for each question, all with the same demonstrations in the order that the seed gives.

    Args:
        specialist: asked once, for demonstrations and questions together.
        shots, queries: (input, output); a question's output is the answer and never stands in the context.
        label: what stands before a draft; several are numbered.
        writing: of `fewshot.build`: instruction, names, tokenizer.

    Raises:
        HoldfastError: the specialist does not answer for every input, or a draft has more than one line.
    """
    inputs = [x for x, _ in (*shots, *queries)]
    found = [tuple(z.strip() for z in own if z.strip()) for own in specialist(inputs)]
    if len(found) != len(inputs):
        what = f"The specialist gave drafts for {len(found)} of {len(inputs)} inputs."
        raise HoldfastError(what, "Give a list for each input, empty where there is none.")
    long = next((z for own in found for z in own if len(z.splitlines()) > 1), None)
    if long is not None:
        what = f"A draft has more than one line: {long[:60]!r}."
        raise HoldfastError(what, "Cut drafts to a line each, as that is how they are shown.")
    order = list(range(len(shots)))
    random.Random(seed).shuffle(order)
    shown = [(with_drafts(shots[n][0], found[n], label), shots[n][1]) for n in order]
    out = []
    for (x, y), own in zip(queries, found[len(shots) :], strict=True):
        prompt = build(form, shown, (with_drafts(x, own, label), y), **writing)
        out.append(Hinted(prompt, own, seed, tuple(order)))
    return out


def with_drafts(x: str, drafts: Sequence[str], label: str) -> str:
    """An input with a line for each draft behind it."""
    names = [label] if len(drafts) == 1 else [f"{label} {n}" for n in range(1, len(drafts) + 1)]
    return "\n".join([x, *(f"{name}: {z}" for name, z in zip(names, drafts, strict=True))])


def drafts_of(model: Any, tokenizer: Any, template: str = "{x}", max_tokens: int = 64) -> Specialist:
    """A causal language model as a specialist: the first line of its greedy text after `template`, {x} filled in."""

    def draft(inputs: Sequence[str]) -> list[list[str]]:
        contexts = [template.replace("{x}", x) for x in inputs]
        asked = [Probe("drafts", str(n), "generate", c, max_tokens=max_tokens) for n, c in enumerate(contexts)]
        return [text.strip().splitlines()[:1] for text in generate(model, tokenizer, asked)]

    return draft


def copy_rate(answers: Sequence[str], prompts: Sequence[Hinted]) -> float:
    """Share of the answers that are one of the drafts shown for them, without regard to outer blanks."""
    if not answers or len(answers) != len(prompts):
        what = f"There are {len(answers)} answers to {len(prompts)} prompts."
        raise HoldfastError(what, "Give an answer for each prompt, and at least one.")
    return sum(a.strip() in p.drafts for a, p in zip(answers, prompts, strict=True)) / len(answers)
