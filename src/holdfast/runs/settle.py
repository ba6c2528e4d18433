"""The last step under a budget (`measure.budget`): what of the change may stay, so that every bound holds.

Where the whole change meets every bound, that is one measurement and nothing is changed. Else the model is healed
(`settle_heal`): a short training with the task's rows and the base as teachers. Where that does not meet the bounds,
or gives back more than a tenth of what the task gained, the weights walk back from the tuned model towards the base in
a straight line (WiSE-FT, arXiv 2109.01903; on a LoRA adapter its scale, which is the same). One half of the items and
the validation rows decide; `measuring` then reports on the other half, so no number in the report was chosen on.

A bound is met as in a repair, with a standard error to spare (`repair_search.sure`). Where nothing that was looked at
does so without giving back more than a tenth of the gain, the estimate alone has to do (`repair_search.affordable`);
after a healing nothing further is looked at for being surer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from holdfast.data.metric import metric_of
from holdfast.engine.processes import world
from holdfast.measure.compare import ability
from holdfast.measure.tuned_task import task_estimates
from holdfast.recipe import KEEP_FRAC
from holdfast.runs import budget, settle_heal
from holdfast.runs.change import Change, base_tensors
from holdfast.runs.halves import CHOOSE, Measured, halves_of
from holdfast.runs.joined import joined
from holdfast.runs.measuring import made_by
from holdfast.runs.repair_search import GIVEN_BACK, Point, affordable, gives_back
from holdfast.runs.work import Job

SURELY = "by a standard error on the items for choosing"
LIKELY = "by its estimate on the items for choosing, but not by a standard error too"
HALVINGS = 3  # ours: looks between all of the change and none of it
NOISE = 0.02  # ours: of a share kept, on the default number of items
BASE = "before.choose.json"  # the base's answers on the choosing half, in the run folder


@dataclass(frozen=True)
class End:
    """Where a run may end: `share` of what it trained, or, healed, all of that and `share` of the healing."""

    share: float
    healed: bool = False


def remember(job: Job, key: str | None) -> None:
    """The untouched base's answers on the choosing half; before training.

    Raises:
        ModelError: the base's files do not give its tensors by name, and after the training they would be needed.
    """
    base_tensors(job.source, job.session)
    made, known = made_by(job.model), job.run.folder.read(BASE)
    if known is None or known.get("made") != made:
        found = halves_of(job).measured(CHOOSE, job.model, key=key, tell=_told(job, "measure before"))
        job.run.folder.write(BASE, {**found, "made": made})


def settle(job: Job, change: Change, model: Any, soft: Any) -> tuple[Any, dict[str, Any]]:
    """Heal what breaks a bound on the choosing half, else scale the change; the task as good as it can be.

    Returns (the model: `model`, or another one that was healed; {"share": of the change, or of the healing where
    "healed", "met": None where no bound could be measured, "surely": whether by a standard error, "points": what each
    end scored, "unseen": the abilities with a bound that the base does not have, "why": why all of the change stays
    whatever it meets, "unhealed": why healing was not tried where it was called for, "floors" and "others": see
    `budget.floors_of`, "said": all this in words}).
    """
    base, halves = job.run.folder.read(BASE), halves_of(job)

    def look(share: float) -> Point:
        change.scale(model, share)
        told = _told(job, "search")
        told(len(points) / (1 + HALVINGS), f"{share:.0%} of the change")
        return _point(job, End(share), base, halves.measured(CHOOSE, model, soft))

    def look_healed(share: float) -> Point:
        healing.scale(share)
        _told(job, "search")(len(looks) / 2, f"{share:.0%} of the healing")
        return _point(job, End(share, healed=True), base, halves.measured(CHOOSE, healing.model))

    points: list[Point] = []
    looks: list[Point] = []
    healing: Any = None
    said: dict[str, Any] = {} if change.straight else {"why": "what was trained is more than a scale of its change"}
    with job.run.timed("search"):
        points.append(look(1.0))
        whole = points[0]
        ends = {"tuned": whole.value, "base": _value(job, base)}
        if whole.shown["kept"] and not whole.meets:
            said["unhealed"] = budget.why_unhealed(job, soft)
            if not said["unhealed"]:
                try:
                    healing = settle_heal.heal(job, model, -whole.margin, _told(job, "heal"))
                    looks.append(look_healed(1.0))
                    if looks[0].may_meet and gives_back(looks[0], **ends):  # it pulled harder than it had to
                        looks.append(look_healed(0.5))
                except Exception as error:  # no memory, say: what was trained is worth more
                    if world()[1] > 1:  # the others wait for this one
                        raise
                    said["unhealed"] = _why(error)
                    looks, healing = [], None
                _let_go()  # behind the error, which holds all that it passed
            best = affordable([*points, *looks], **ends)
            enough = best.meets or (bool(looks) and best.may_meet)  # where nothing was healed, the line may be sure
            if change.straight and (not enough or gives_back(best, **ends)):
                _halve(points, look, gain=ends["tuned"] - ends["base"], surely=best.may_meet and not looks)
        best = affordable([*points, *looks], **ends)
        try:
            model = _taken(model, change, healing, best.candidate)
        except Exception as error:  # what was healed cannot be merged
            if world()[1] > 1 or not best.candidate.healed:
                raise
            said["unhealed"], best = _why(error), affordable(points, **ends)
            model = _taken(model, change, None, best.candidate)
        points += looks
    held = budget.floors_of(job)
    unseen = [name for name in (*held["floors"], *held["others"]) if name not in best.shown["kept"]]
    met = best.may_meet if best.shown["kept"] else None
    which = {**{k: v for k, v in _shown(best).items() if k in ("share", "healed")}, "surely": bool(met) and best.meets}
    out = {**which, "met": met, "points": [_shown(p) for p in points], "unseen": unseen, **held, **said}
    return model, out | {"said": words(out)}


def _taken(model: Any, change: Change, healing: Any, end: End) -> Any:
    """The model of an end, in place or a healed one."""
    change.scale(model, 1.0 if end.healed else end.share)
    if not end.healed:
        return model
    healing.scale(end.share)
    return joined(model, healing.model) or healing.plain()


def _why(error: Exception) -> str:
    """What went wrong, in one line."""
    return str(getattr(error, "what", error)).split("\n")[0].rstrip(".") or type(error).__name__


def _let_go() -> None:
    """Give back what a healing held beside its model: a session and what it counts know each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _halve(points: list[Point], look: Callable[[float], Point], gain: float = 0.0, surely: bool = False) -> None:
    """Look between the largest share that may meet the bounds and the smallest that does not; 0 meets them.

    What lies within the noise of the bound is not told apart by a finer look, and is left where the task does not tell
    it apart either. gain: of the task by the whole change. surely: by a standard error.
    """

    def above(p: Point) -> float:
        return p.margin if surely else p.estimate

    for _ in range(HALVINGS):
        low = max((p for p in points if above(p) >= 0), key=lambda p: p.candidate.share, default=None)
        high = min((p for p in points if above(p) < 0), key=lambda p: p.candidate.share, default=None)
        if high is None:
            return
        if low and above(high) > -NOISE and high.value - low.value <= GIVEN_BACK * max(0.0, gain):
            return
        points.append(look(((low.candidate.share if low else 0.0) + high.candidate.share) / 2))


def _point(job: Job, end: End, base: Measured, found: Measured) -> Point:
    floors = budget.named(job)
    pairs = zip(base["abilities"], found["abilities"], strict=True)
    parts = [ability(b, a, floors.get(b["suite"], KEEP_FRAC)) for b, a in pairs]
    kept = {p["name"]: p["retention"] for p in parts if p["retention"]}
    shown = {"task": _task(job, found), "kept": kept}
    likely = budget.margin(job, kept, spare=False)
    return Point(end, _value(job, found), budget.margin(job, kept), (CHOOSE,), shown, likely)


def _task(job: Job, found: Measured) -> dict[str, Any]:
    """The task's estimate, in its own unit."""
    return task_estimates(metric_of(job.task.metric), None, found["task"])["after"]


def _value(job: Job, found: Measured) -> float:
    """The task's score, higher is better."""
    value = _task(job, found)["value"]
    return -value if metric_of(job.task.metric).lower else value


def _shown(p: Point) -> dict[str, Any]:
    return {**asdict(p.candidate), "meets": p.meets, "may_meet": p.may_meet, "margin": p.margin, **p.shown}


def words(found: Mapping[str, Any]) -> str:
    """What the search did, as a clause of the report."""
    unseen, seen = ", ".join(found["unseen"]), {k: v for k, v in found["floors"].items() if k not in found["unseen"]}
    bound = budget.bounds(seen, [name for name in found["others"] if name not in found["unseen"]])
    blind = f"nothing is held of {unseen}, which the base is not shown to have" if unseen else ""
    return "; ".join(filter(None, [_outcome(found, bound) if bound else "", blind]))


def _outcome(found: Mapping[str, Any], bound: str) -> str:
    how, unhealed = SURELY if found["surely"] else LIKELY, found.get("unhealed")
    tried = f"; it could not be healed, since {unhealed}" if unhealed else ""
    if found["healed"]:
        meets = "meets it" if found["surely"] else f"meets it {LIKELY},"
        does = f"{meets} and was used" if found["met"] else "does not either, but is the nearest to it"
        return f"{_failed(found, bound)}; {found['share']:.0%} of a short training towards the base (heal) {does}"
    if found["share"] == 1 and found["met"]:
        more = "" if found["surely"] else tried or _lost(found)
        return f"the whole change meets the budget ({bound}) {how}{more}"
    if "why" in found:
        return f"the budget ({bound}) is not met and could not be enforced: {found['why']}{tried}"
    kept = f"{found['share']:.0%} of the change was kept"
    if found["met"]:
        return f"{kept}, the best seen that meets the budget ({bound}) {how}{tried or _lost(found)}"
    return f"{_failed(found, bound)}; {kept}, the nearest to it{tried}"


def _lost(found: Mapping[str, Any]) -> str:
    """That a healing was tried and not used."""
    tried = any(p["healed"] for p in found["points"])
    return "; a short training towards the base (heal) was tried and is no better" if tried else ""


def _failed(found: Mapping[str, Any], bound: str) -> str:
    """What the change alone came to, where it is not what was used."""
    line = [p for p in found["points"] if not p["healed"]]
    if "why" in found:
        what = f"the change, of which no part can be taken back ({found['why']}), does not meet"
    elif most := max((p["share"] for p in line if p["meets"]), default=0.0):
        return f"{most:.0%} of the change meets the budget ({bound}) {SURELY}, but this keeps more of the task"
    else:
        what = "no part of the change that was looked at meets" if line[1:] else "the whole change does not meet"
    return f"{what} the budget ({bound}) {SURELY}"


def _told(job: Job, phase: str) -> Callable[[float, str], None]:
    return lambda share, words: job.run.tell(phase, share, words)
