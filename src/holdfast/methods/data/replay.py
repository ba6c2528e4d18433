"""Replay: mix general text and instructions into the task's data.

Of the whole mix, `share` (counted in examples or tokens) comes from `sources`, each with its own weight; sources
shorter than needed are repeated, and the run reports what was realised. Text rows carry loss on every token,
instruction rows on the answer. Default sources are the small general set shipped with Holdfast; give your own (json,
jsonl, csv, parquet, hub id). A general set below the model's own quality degrades it.
Paper: union of general and task data regularises (cocktail effect); its exact ratios were not readable.
Cost: share / (1 - share) more rows. The folklore cure: see the leaderboard before trusting it.
Combine with: everything.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from holdfast.data.mix import Mix, Source
from holdfast.engine.pack import TokenRow
from holdfast.errors import PlanError
from holdfast.method import Method, Paper
from holdfast.services import Context

GENERAL = ("holdfast:general/instructions.jsonl", "holdfast:general/text.jsonl")


@dataclass(frozen=True, kw_only=True)
class Replay(Method):
    """General-data mixing (Brief et al. 2024), arXiv 2410.01109."""

    share: float = 0.1  # ours; the paper's ratios were not readable
    sources: tuple[str, ...] = GENERAL
    weights: tuple[float, ...] | None = None  # of the sources among themselves; None is equal
    unit: str = "examples"
    max_tokens: int = 256  # ours; longer rows are cut
    seed: int = 0

    paper: ClassVar = Paper("Mixing It Up: The Cocktail Effect of Multi-Task Fine-Tuning on LLM Performance",
                            "2410.01109", "the default share comes from no paper")  # fmt: skip
    does: ClassVar = "mixes general text and instructions into the training data"
    strengths: ClassVar = ("share",)
    odds: ClassVar = strengths

    def off(self) -> bool:
        return self.share == 0

    def check(self, ctx: Context) -> None:
        if not 0 <= self.share < 1:
            raise PlanError(f"Replay.share is {self.share}.", "Use a part of the mix, 0 or more and below 1.")
        if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) < 0 or not sum(self.weights)):
            raise PlanError(
                f"Replay has {len(self.sources)} sources but weights {list(self.weights)}.",
                "Give one weight of 0 or more for each source, not all 0.",
            )
        if self.unit not in ("examples", "tokens"):
            raise PlanError(f"Replay.unit is {self.unit!r}.", "Use 'examples' or 'tokens'.")

    def data(self, mix: Mix, ctx: Context) -> Mix:
        weights = self.weights or (1.0,) * len(self.sources)
        for path, weight in zip(self.sources, weights, strict=True):
            rows = read_sources((path,), ctx, owner="task", source=f"Replay:{Path(path).stem}", seed=self.seed)
            usable = cut_rows(rows, self.max_tokens, f"Replay, {Path(path).name}", ctx)
            mix = mix.add(Source(f"Replay:{path}", usable, self.share * weight / sum(weights), self.unit))
        return mix


def cut_rows(rows: Sequence[TokenRow], most: int, of: str, ctx: Context) -> list[TokenRow]:
    """Rows of at most so many tokens, without those of which no target is left; what that costs is noted.

    Text loses its rest as it must; that an answer loses its end, or is left out, is no matter of course.
    """
    cut = [r.cut(most) for r in rows]
    gone = sum(not r.scored.any() for r in cut)
    sides = zip(rows, cut, strict=True)
    ends = sum(len(c.ids) < len(r.ids) and c.scored.any() and not r.scored[1:].all() for r, c in sides)
    said = [f"{gone} left out, as their answers begin behind {most} tokens"] * bool(gone)
    said += [f"{ends} cut to {most} tokens, within the answer"] * bool(ends)
    if said:
        ctx.notes.append(f"{of}: of {len(rows)} rows {' and '.join(said)}")
    return [r for r in cut if r.scored.any()]


def read_sources(
    sources: Sequence[str],
    ctx: Context,
    *,
    owner: str,
    source: str | None = None,
    all_tokens: bool = False,
    most: int | None = None,
    seed: int = 0,
) -> list[TokenRow]:
    """Tokenised rows of general data files, in one shuffled order that depends on the run's seed and `seed` alone.

    most: the first so many of that order alone are tokenised; None is all.
    """
    from holdfast.data.encoder import stops_of
    from holdfast.data.rows import read_rows
    from holdfast.data.tokens import tokenize_all

    rows = [r for s in sources for r in read_rows(s, base_dir=ctx.base_dir or Path.cwd(), tokenizer=ctx.tokenizer)]
    random.Random(f"replay/{ctx.seed}{f'/{seed}' if seed else ''}").shuffle(rows)
    stops = stops_of(getattr(ctx.model, "generation_config", None))
    kind = {"owner": owner, "source": source or owner, "all_tokens": all_tokens, "stops": stops}
    return tokenize_all(rows[:most], ctx.tokenizer, None, **kind)
