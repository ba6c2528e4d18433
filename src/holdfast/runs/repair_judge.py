"""What merges of a base and a tuned model score: one model in memory, whose weights each candidate replaces.

Every measurement is kept in the cache by content (both models, the merge, the items), so a search that was killed, or
that is asked for another bound, goes on with what is known.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from holdfast import models
from holdfast.engine import BATCH_TOKENS
from holdfast.errors import HoldfastError
from holdfast.files import content_key
from holdfast.measure.asking import score_suite
from holdfast.measure.compare import ability
from holdfast.measure.parts import COARSE, FINE, REPORT, join, whole_parts
from holdfast.measure.probe import Ask, Suite
from holdfast.measure.suites import asked_of, build, check_suite, remembered
from holdfast.method import Method
from holdfast.models.identity import file_sha
from holdfast.runs.repair_goal import Goal, Items
from holdfast.runs.repair_search import MADE, SOUP, TUNED, Candidate, Point, margins_of
from holdfast.sites.merge_files import Pair

BASE = Candidate("base")
CHOOSING = (COARSE, FINE)


class Judge:
    """Asks candidates for abilities and the task.

    Args:
        pair: the two models.
        suites: names of what is measured.
        floors: ability -> share of the base's that must be left, of those that bind.
    """

    def __init__(
        self,
        pair: Pair,
        suites: Sequence[str],
        floors: Mapping[str, float],
        *,
        num_fewshot: int = 8,
        limit: int | None = None,
        labels: Sequence[str] = (),
        batch_tokens: int = BATCH_TOKENS,
    ):
        self.pair, self.floors, self.batch_tokens = pair, dict(floors), batch_tokens
        self.tokenizer: Any = models.load_tokenizer(pair.tuned, False)
        self.device, self.dtype = models.auto_place()
        ask = Ask(self.tokenizer, num_fewshot, limit, labels=tuple(labels))
        self.suites = {name: self._cut(name, ask) for name in suites}
        self.goal: Goal | None = None
        self.others: list[str | None] = []  # identities of further tuned models
        self.made: Callable[[Candidate], Any] | None = None  # the method, with a file, of a candidate of MADE
        self._holds = TUNED

    def _cut(self, name: str, ask: Ask) -> dict[str, Suite]:
        if name.startswith("lm_eval:"):
            what = f"repair chooses and reports on different items, and {name} cannot be cut into parts."
            raise HoldfastError(what, "Use suites of Holdfast or jsonl:<path>.")
        check_suite(name, ask, models.context_length(self.pair.tuned))
        return whole_parts(build(name, ask), "--limit")

    # ---- the model in memory

    @cached_property
    def _model(self) -> Any:
        return models.load(self.pair.tuned, merge_adapter=True)[0]

    def model(self, who: Candidate) -> Any:
        """The model of a candidate, or of the base; the one that was given before changes into it."""
        if who != self._holds:
            self._fill(self.pair.base_weights.items() if who == BASE else self.pair.merged(self.methods(who)))
            self._holds = who
        return self._model

    def methods(self, who: Candidate) -> list[Method]:
        """What makes a candidate of the tuned model."""
        if who.method not in MADE:
            return who.methods
        assert self.made is not None
        return [self.made(who)]

    @torch.no_grad()
    def _fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        params = dict(self._model.named_parameters())
        self._holds = Candidate("half filled")
        for name, new in weights:
            params[name].copy_(new)

    def forget(self) -> None:
        """Let the weights go, and those of a training that its hooks still tie together."""
        self.__dict__.pop("_model", None)
        self._holds = TUNED
        gc.collect()

    # ---- what it scores

    def abilities(self, who: Candidate, parts: Sequence[str], tell: Callable[[float, str], None]) -> list[Any]:
        """A measurement of each suite, on the items of `parts`."""
        out = []
        for n, (name, own) in enumerate(self.suites.items()):
            tell(n / (len(self.suites) + 1), f"{who.label}: {name}")
            out.append(join([self._ability(who, own[part]) for part in parts]))
        return out

    def _ability(self, who: Candidate, suite: Suite) -> Any:
        asked = [suite.name, suite.settings, *asked_of(suite)]
        return self._kept(who, asked, lambda: self._scored(self.model(who), suite))

    def task(self, who: Candidate, parts: Sequence[str]) -> Items:
        """Items of the task, on the rows of `parts`."""
        goal = self.goal
        assert goal is not None
        out: Items = []
        for part in parts:
            out += self._kept(who, [part, goal.asked[part]], partial(self._scored_task, goal, who, part))
        return out

    def _scored_task(self, goal: Goal, who: Candidate, part: str) -> Items:
        return goal.score(self.model(who), part)

    def _kept(self, who: Candidate, asked: Any, make: Callable[[], Any]) -> Any:
        ends = [self.pair.base.sha, self.pair.tuned.sha, str(self.dtype), self.device.type, self.batch_tokens]
        made = file_sha(Path(self.made(who).file)) if who.method in MADE and self.made else ""
        made = self.others if who.method == SOUP else made
        return remembered(content_key("repair", ends, who.method, dict(who.settings), made, asked), make)

    def measurable(self, parts: Sequence[str], tell: Callable[[float, str], None]) -> bool:
        """Whether the base shows every ability with a floor on the items of `parts`."""
        found = {m["suite"]: ability(m, None, 1.0)["status"] for m in self.abilities(BASE, parts, tell)}
        return all(found[name] != "not measurable" for name in self.floors)

    def point(self, who: Candidate, parts: Sequence[str], tell: Callable[[float, str], None]) -> Point:
        """A candidate on the items of `parts`."""
        assert self.goal is not None
        before, after = (self.abilities(w, parts, tell) for w in (BASE, who))
        judged = [ability(b, a, self.floors.get(b["suite"], 0.0)) for b, a in zip(before, after, strict=True)]
        kept = {a["name"]: a["retention"] for a in judged if a["retention"]}
        items = self.task(who, parts)
        score = self.goal.estimates(items, items)["after"]
        margins = margins_of(kept, self.floors)
        shown = {"task": score, "kept": kept}
        return Point(who, self.goal.value(items), min(margins, default=-1.0), tuple(parts), shown)

    def measured(self, model: Any, tell: Callable[[float, str], None]) -> tuple[list[Any], Items]:
        """Abilities and task of a model in memory, on the items of the report."""
        assert self.goal is not None
        out = []
        for n, (name, own) in enumerate(self.suites.items()):
            tell(n / (len(self.suites) + 1), name)
            out.append(self._scored(model, own[REPORT]))
        return out, self.goal.score(model, REPORT)

    def _scored(self, model: Any, suite: Suite) -> Any:
        return score_suite(model, self.tokenizer, suite, batch_tokens=self.batch_tokens)
