"""repair, piece by piece: look at the two ends, search, write the chosen merge, measure it on items not yet used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from holdfast import models
from holdfast.engine import BATCH_TOKENS
from holdfast.errors import HoldfastError, RecipeError
from holdfast.files import content_key, safe_name
from holdfast.measure.compare import abilities
from holdfast.measure.names import names_of
from holdfast.measure.parts import COARSE, REPORT
from holdfast.method import Method
from holdfast.models.related import check_related
from holdfast.recipe import KEEP_FRAC
from holdfast.runs import repair_goal
from holdfast.runs.folder import JsonOrder, RunFolder
from holdfast.runs.repair_heal import FEWEST, Healed, check_prompts, heal, write_change
from holdfast.runs.repair_judge import BASE, CHOOSING, Judge
from holdfast.runs.repair_made import READS_HARM, check_pair, made, read_harmful
from holdfast.runs.repair_search import (
    DEFAULT,
    HEAL,
    TUNED,
    Candidate,
    Point,
    candidates,
    choose,
    choose_nearest,
    falls_short,
    search,
)
from holdfast.runs.run import Tell, silent
from holdfast.sites import adapter_files
from holdfast.sites.merge_files import Pair
from holdfast.versions import versions

MODEL, ADAPTER, HEALED, MADE, LAST = "model", "adapter", "heal.safetensors", "made", "repair.json"
WORK = {MODEL, ADAPTER, HEALED, MADE, LAST}
ENDS = (BASE, TUNED)


@dataclass(frozen=True)
class Wish(JsonOrder):
    """What a repair is asked for; a folder belongs to one. Paths as they were typed."""

    base: str
    tuned: str
    also: Sequence[str] = ()
    data: str | None = None
    prompt: str | None = None
    completion: str | None = None
    metric: str | None = None
    prompts: str | None = None
    harmful: str | None = None
    overlap: bool = False
    keep: Mapping[str, float] = field(default_factory=lambda: {"in-context": KEEP_FRAC})
    suites: Sequence[str] = ("in-context",)
    methods: Sequence[str] = DEFAULT
    num_fewshot: int = 8
    limit: int | None = None
    labels: Sequence[str] = ()
    batch_tokens: int = BATCH_TOKENS

    def check(self) -> None:
        """Raise HoldfastError for what is wrong without looking at a model."""
        names = names_of(self.suites)
        unknown = next((k for k in self.keep if k not in names), None)
        if unknown:
            what = f"--keep names {unknown!r}, but only {', '.join(names)} is measured."
            raise HoldfastError(what, "Add it with --suite.")
        if not self.keep:
            raise HoldfastError("Nothing is to be kept, so there is no bound.", "Write --keep in-context=0.97.")
        if self.data and self.prompts:
            raise HoldfastError("--data and --prompts both say what the task is.", "Give one of the two.")
        candidates(self.methods)
        self._check_harmful()
        if len({self.tuned, *self.also}) <= len(self.also):
            raise HoldfastError("A tuned model is named twice.", "Name each once, the others with --also.")

    def _check_harmful(self) -> None:
        asked = [name for name in self.methods if name in READS_HARM]
        if asked and not self.harmful:
            what = f"{asked[0]} reads harmful prompts with their answers, and none are given."
            raise HoldfastError(what, "Give them with --harmful harmful.jsonl, or leave it out of --method.")
        if self.harmful and not asked:
            what = f"--harmful is read by {' and '.join(sorted(READS_HARM))} alone, and neither is tried."
            raise HoldfastError(what, "Add --method antidote or --method realign.")


def repaired(wish: Wish, out: Path, tell: Tell = silent) -> dict[str, Any]:
    """Repair into the folder `out`, from wherever it stands; returns what stands in its repair.json.

    Raises:
        HoldfastError: one clear message for anything a user can mend.
    """
    wish.check()
    folder = RunFolder(out, wish, WORK, Wish.read, LAST)
    if folder.finished:
        return folder.read(LAST)
    tell("load", 0.0, wish.tuned)
    try:
        folder.claim()
        work = _Work(wish, folder, tell)
    except RecipeError as e:
        raise RecipeError(e.what, "Choose another folder with -o.") from e
    folder.check_room(work.pair.size, "the files of the repaired model")
    points, chosen = work.search()
    report = work.finish(points, chosen)
    folder.write(LAST, report)
    return folder.read(LAST)


class _Work:
    """One repair at work."""

    def __init__(self, wish: Wish, folder: RunFolder, tell: Tell):
        self.wish, self.folder, self.tell = wish, folder, tell
        self.pair = Pair(wish.base, wish.tuned, wish.overlap)
        if self.pair.base.sha == self.pair.tuned.sha:
            what = f"{self.pair.tuned.label} has the weights of its base {self.pair.base.label}: nothing was tuned."
            raise HoldfastError(what, "Name the tuned model second.")
        self.judge = Judge(
            self.pair,
            names_of(wish.suites),
            wish.keep,
            num_fewshot=wish.num_fewshot,
            limit=wish.limit,
            labels=wish.labels,
            batch_tokens=wish.batch_tokens,
        )
        self.goal = self.judge.goal = self._goal()
        self.judge.made = self._made
        check_pair(wish.methods, self.pair)
        self.harmful = read_harmful(wish.harmful, self.judge.tokenizer) if wish.harmful else []
        if HEAL in wish.methods:
            check_prompts(self.goal.prompts)
        inputs: dict[str, Any] = {"base": self.pair.base.sha, "tuned model": self.pair.tuned.sha}
        inputs |= {f"tuned model {name}": self._other(name) for name in wish.also}
        if self.harmful:
            inputs["harmful rows"] = content_key([r.ids.tolist() for r in self.harmful])
        folder.keep_inputs({**inputs, "task": content_key(dict(self.goal.asked))})

    def _goal(self) -> repair_goal.Goal:
        w, tokens = self.wish, self.judge.tokenizer
        if w.data:
            return repair_goal.from_data(
                w.data,
                prompt=w.prompt,
                completion=w.completion,
                metric=w.metric,
                tokenizer=tokens,
                batch_tokens=w.batch_tokens,
            )
        sha = content_key(self.pair.tuned.sha, str(self.judge.dtype), self.judge.device.type)
        return repair_goal.from_answers(lambda: self.judge.model(TUNED), tokens, sha, w.prompts, w.batch_tokens)

    def _other(self, name: str) -> str | None:
        """The identity of a further tuned model, which must be a relative too."""
        source = models.resolve(name)
        check_related(source, self.pair.like, self.pair.tokenizer, self.pair.base_weights)
        self.judge.others.append(source.sha)
        return source.sha

    def _made(self, who: Candidate) -> Method:
        """What a candidate that looks at rows changes; found when it is first asked for."""
        if who.method == HEAL:
            return Healed(file=str(self._healed(who)), share=who.settings.get("share", 1.0))
        file = self.folder.path / MADE / f"{safe_name(who.label)}.safetensors"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            self.judge.forget()
            self.tell(who.method, 0.0, f"{who.label}: looks at its rows")
        return made(who.method, who.settings, self.pair, self.goal.rows, self.harmful, file)

    def _healed(self, who: Candidate) -> Path:
        """The file of a short training, which is made when it is first asked for."""
        file, judge = self.folder.path / HEALED, self.judge
        if not file.exists():
            base, tuned = partial(judge.model, BASE), partial(judge.model, TUNED)
            settings: dict[str, Any] = {"steps": who.settings["steps"]}
            told = self._told("heal")
            told(0.0, "answers of the base")
            write_change(heal(base, tuned, judge.tokenizer, self.goal.prompts, tell=told, **settings).model, file)
            judge.forget()
        return file

    # ---- the search

    def search(self) -> tuple[list[Point], Point]:
        """All points and the chosen one."""
        asked = candidates(self.wish.methods)
        self._may_search()
        first = (COARSE,) if self.judge.measurable((COARSE,), self._told("measure before")) else CHOOSING
        seen = 0

        def coarse(who: Candidate) -> Point:
            nonlocal seen
            seen += 1
            share = min(1.0, (seen - 1) / len(asked))  # lines are bent beyond those that were asked for
            return self.judge.point(who, first, self._told("search", share, (1 - share) / len(asked)))

        fine = self._told("second look")
        pick = choose if self.wish.data else choose_nearest
        points, chosen = search(asked, coarse, lambda who: self.judge.point(who, CHOOSING, fine), self.wish.also, pick)
        if tuple(self.wish.methods) == DEFAULT and self._falls_short(points, chosen):
            points += [self.judge.point(who, CHOOSING, fine) for who in candidates([HEAL])]
            chosen = pick([p for p in points if p.parts == chosen.parts])
        return points, chosen

    def _falls_short(self, points: Sequence[Point], chosen: Point) -> bool:
        """Whether the merges fall short, and healing is possible."""
        if len(self.goal.prompts) < FEWEST:
            return False
        tuned = next(p for p in points if p.candidate == TUNED)
        base = self.judge.point(BASE, CHOOSING, self._told("measure before"))
        return falls_short(chosen, tuned.value, base.value)

    def _may_search(self) -> None:
        if not self.judge.measurable(CHOOSING, self._told("measure before")):
            what = f"{self.pair.base.label} does not show every ability to keep ({', '.join(self.wish.keep)}) clearly."
            raise HoldfastError(what, "Raise --limit, or keep an ability that it has.")

    def _told(self, phase: str, start: float = 0.0, size: float = 1.0) -> Any:
        return lambda share, words: self.tell(phase, start + size * share, words)

    # ---- its outcome

    def finish(self, points: Sequence[Point], chosen: Point) -> dict[str, Any]:
        """Write the model and measure it; everything for repair.json."""
        who, told = chosen.candidate, self._told("measure after")
        ends = {w.method: (self.judge.abilities(w, (REPORT,), told), self.judge.task(w, (REPORT,))) for w in ENDS}
        base = self.judge.point(BASE, CHOOSING, told)
        self.judge.forget()
        written = self._told("export")
        methods, target = self.judge.methods(who), self.folder.path / MODEL
        target = self.pair.write(methods, target, card=_card(self.pair, chosen), tell=lambda x: written(x, ""))
        after, task = self.judge.measured(models.load(str(target))[0], told)
        outcome = self._outcome(ends, after, task)
        return {
            **_stamp(),
            "base": _named(self.pair.base),
            "tuned": _named(self.pair.tuned),
            "model": str(target),
            "adapter": self._adapter(methods, _card(self.pair, chosen)),
            "keep": dict(self.wish.keep),
            "chosen": _shown(chosen),
            "met": chosen.meets,
            **_verdict(chosen, outcome, self.wish.keep),
            "points": [_shown(p) for p in [base, *points]],
            "report": outcome,
            "settings": asdict(self.wish),
        }

    def _adapter(self, methods: Sequence[Method], card: str) -> str | None:
        """The folder of the repaired adapter, where the tuned model is one and scaling it is all there is to do."""
        tuned = self.pair.tuned
        if tuned.kind != "adapter" or not adapter_files.may_scale(tuned, methods):
            return None
        return str(adapter_files.scaled(tuned, methods, self.pair.num_layers, self.folder.path / ADAPTER, card))

    def _outcome(self, ends: Mapping[str, Any], after: Sequence[Any], task: Any) -> dict[str, Any]:
        """On the items of the report: the task of all three, and what the tuned and the repaired model kept."""
        base, tuned = ends[BASE.method], ends[TUNED.method]
        sides = self.goal.estimates(tuned[1], task)
        return {
            "task": {
                "name": self.goal.name,
                "source": self.goal.source,
                "metric": self.goal.metric.words,
                "unit": self.goal.metric.unit,
                "lower": self.goal.metric.lower,
                "base": self.goal.estimates(base[1], base[1])["after"],
                "tuned": sides["before"],
                "repaired": sides["after"],
                "difference": sides["difference"],
            },
            "tuned": abilities(base[0], tuned[0], self.wish.keep, KEEP_FRAC),
            "repaired": abilities(base[0], after, self.wish.keep, KEEP_FRAC),
        }


def _stamp() -> dict[str, Any]:
    used = versions()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"holdfast_version": used["holdfast"], "created": now, "kind": "repair", "versions": used}


def _named(source: Any) -> dict[str, Any]:
    return {"name": source.name, "revision": source.revision, "sha": source.sha}


def _shown(p: Point) -> dict[str, Any]:
    c = p.candidate
    plain = {"label": c.label, "method": c.method, "settings": dict(c.settings), "parts": list(p.parts)}
    return {**plain, "meets": p.meets, "margin": p.margin, **p.shown}


def _verdict(chosen: Point, outcome: Mapping[str, Any], floors: Mapping[str, float]) -> dict[str, str]:
    """status: "not met" while choosing, else the worst of the report's: lost, unclear or kept."""
    found = {a["name"]: a["status"] for a in outcome["repaired"] if a["name"] in floors}
    worst = next((s for s in ("lost", "unclear", "kept") if s in found.values()), "unclear")
    if any(s not in ("lost", "kept") for s in found.values()) and worst == "kept":
        worst = "unclear"
    bound = ", ".join(f"{name} {floor:g}" for name, floor in floors.items())
    label = chosen.candidate.label
    if not chosen.meets:
        return {"status": "not met", "sentence": f"No candidate meets the bound ({bound}). The nearest is {label}."}
    words = {
        "kept": "and the report's own items prove it",
        "unclear": "and the report's own items are too few to prove it",
        "lost": "but on the report's own items it does not",
    }
    meets = f"{label} meets the bound ({bound}) on the items it was chosen on"
    return {"status": worst, "sentence": f"{meets}, {words[worst]}."}


def _card(pair: Pair, chosen: Point) -> str:
    return (
        f"# A repaired model\n\nMade by `holdfast repair` from {pair.base.label} and {pair.tuned.label}: "
        f"{chosen.candidate.label}. `repair.json` one folder up has the whole curve.\n"
    )
