"""The copying suite: does the model still use what stands earlier in its own context?

random sequence: LENGTH different common words are shown once and begin again; after each repeated word the model has
    to go on with the next. Words and order are random, so only copying (an induction head) can know it. GIVEN words
    are repeated before the first probe: nothing says that the sequence begins again, and the very first word, which
    has no blank before it, is another token there. Olsson et al. 2022 (arXiv 2209.11895) repeat random tokens and take
    the loss; we repeat words, which any tokenizer has, and take the exact match.
early tokens, late tokens: the probability of the words around the 50th token of a passage, read from its beginning,
    and of the same words when other passages on the theme stand before them, so that they lie around the 500th token.
    The difference in loss is the ICL score (`icl_score`). The paper takes the 500th token less the 50th of the same
    texts, over many of them; with a few texts that mostly tells which words happen to lie there, so here the
    words are the same at both places. Further, one token is a window of 2 * HALF, and the texts are own passages
    joined, the first one cut so that the place is right. Compare base with tuned; the published figure is another.
    If a theme is shorter than 500 tokens, or the tokenizer reads less, the late words lie as far in as there is room.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from holdfast.measure.probe import Ask, Group, Probe, Suite
from holdfast.measure.suites.in_context import shuffled
from holdfast.measure.suites.language import read_data

LIMIT = 8  # sequences; half as many passages, whose contexts are ten times as long
LENGTH = 24  # words of a sequence
GIVEN = 2  # repeated words before the first probe
EARLY, LATE = 50, 500  # Olsson et al. 2022; counted from 1, without bos
HALF = 16  # tokens on each side: one token of four texts would be noise
VERSION = 1
WORDS = tuple(
    """
    apple arm army baby back bag ball bank bar base bath beach bear bed bell bench bird boat body bone book boot border
    bottle bowl box boy branch bread bridge brother bus butter button cake camp card case castle cat chain chair cheese
    child church circle city clock cloud coat coffee coin copper corn corner cotton cow cross crowd cup curtain dance
    desk dinner dish doctor dog door dream dress drum duck dust ear earth edge egg engine eye face factory farm father
    feather field finger fire fish flag floor flower fly foot forest fork fox friend frog fruit game garden gate girl
    glass goat gold grass guitar hair hall hammer hand hat head heart hill hole home horse hospital hotel hour house
    ice iron island jacket key king kitchen knee knife ladder lake lamp leaf leather leg letter library light lion lip
    lock map market meat metal milk mirror money monkey moon mother mountain mouse mouth music nail neck needle nose
    ocean office oil orange oven page paint paper park pencil piano picture pig pipe plate pocket prison queen rain
    river road roof room root rope salt sand school sea seed sheep shelf ship shirt shoe silver skin sky snow soap
    """.split()
)


def build_suite(ask: Ask) -> Suite:
    """`limit` sequences of LENGTH - GIVEN probes each, and half as many passages, each read early and late."""
    limit = ask.limit or LIMIT
    probes = [p for n in range(limit) for p in copy_probes(n, ask.seed)]
    for ident, theme, passage, before in texts(ask.seed)[: (limit + 1) // 2]:
        early, late, answer = places(passage, before, ask.tokenizer)
        for task, context in (("early tokens", early), ("late tokens", late)):
            probes.append(Probe(task, f"{task}/{ident}", "likelihood", context, (answer,), cluster=theme))
    chance = 1 / (LENGTH - GIVEN)  # any one word of a sequence is the answer of at most one of its probes
    version, metric = read_data()[0], "token probability (geometric mean)"
    groups = (
        Group("random sequence", VERSION, chance, "begins", clustered=True),
        Group("early tokens", version, 0.0, metric, clustered=True),
        Group("late tokens", version, 0.0, metric, clustered=True),
    )
    return Suite("copying", groups, tuple(probes), {"limit": limit, "seed": ask.seed})


def copy_probes(n: int, seed: int = 0) -> list[Probe]:
    """The probes of sequence `n`, one per repeated word after the given ones; each context begins the next."""
    words = shuffled(f"copying/{seed}/{n}", WORDS)[:LENGTH]
    name = "random sequence"
    return [
        Probe(name, f"{name}/{n}.{k}", "begins", " ".join(words + words[:k]), (f" {words[k]}",), cluster=f"{name}/{n}")
        for k in range(GIVEN, LENGTH)
    ]


def texts(seed: int = 0) -> list[tuple[str, str, str, list[str]]]:
    """(id, theme, passage, the theme's other passages), every theme once before any theme a second time."""
    themes: dict[str, list[str]] = {}
    for p in read_data()[1]["English prose"]:
        themes.setdefault(p.theme, []).append(p.text)
    order = shuffled(f"texts/{seed}", list(themes))
    return [
        (f"{theme}.{n}", theme, themes[theme][n], themes[theme][n + 1 :] + themes[theme][:n])
        for n in range(max(len(passages) for passages in themes.values()))
        for theme in order
        if n < len(themes[theme])
    ]


def places(passage: str, before: Sequence[str], tokenizer: Any) -> tuple[str, str, str]:
    """(early context, late context, answer): the words around token EARLY of `passage`, and what may precede them.

    The late context has LATE - HALF tokens to within a word, or all of `before`, and leaves room for the rest.
    """
    words = passage.split(" ")
    start, end = (_first(words, EARLY + side, tokenizer) for side in (-HALF, HALF))
    early, answer = " ".join(words[:start]), " " + " ".join(words[start:end])
    room = min(LATE - HALF, tokenizer.model_max_length - HALF - _count(answer, tokenizer))
    back = "\n\n".join([*before, early]).split(" ")[::-1]  # counted from its end: the beginning is what is cut
    late = " ".join(back[: _first(back, room + 1, tokenizer) - 1][::-1])
    return early, late, answer


def _first(words: Sequence[str], tokens: int, tokenizer: Any) -> int:
    """The fewest words that make so many tokens; one more than there are if all make fewer."""
    return bisect_left(range(len(words) + 1), tokens, key=lambda n: _count(" ".join(words[:n]), tokenizer))


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def icl_score(early: Sequence[Mapping[str, Any]], late: Sequence[Mapping[str, Any]]) -> float:
    """Loss of the late tokens less that of the early ones, in nats per token, over texts that weigh the same.

    Below 0, the model predicts better with more context; a model that ignores its context has about 0. Report both
    losses with it: tuning that hurts the early tokens alone also lowers it.

    Args:
        early, late: items of the two tasks for the same texts in the same order ("logprob", "num_tokens").

    Raises:
        ValueError: the two are not equally many.
    """
    return fmean(_loss(b) - _loss(a) for a, b in zip(early, late, strict=True))


def _loss(item: Mapping[str, Any]) -> float:
    return -item["logprob"] / item["num_tokens"]
