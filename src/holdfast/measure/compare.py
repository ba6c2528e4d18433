"""Two measurements of the same items: differences, shares kept, verdicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.measure import stats
from holdfast.measure.facts import facts_of
from holdfast.measure.sight import can_see, clusters_of
from holdfast.report.schema import ability_words, task_words

Part = dict[str, Any]
ALPHA = 0.05
WORDS = {"lost": "Lost", "unclear": "Not shown to be kept", "kept": "Kept"}  # the worst first: one loss decides


def _correct(items: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(i["correct"]) for i in items]


def _check_pair(before: Part, after: Part) -> None:
    """Only the same questions, asked in the same way, can be paired."""
    cure = "Measure both models with the same version, suite, shots and limit."
    for key in ("suite", "num_fewshot", "seed", "labels"):
        if before.get(key) != after.get(key):
            what = f"One measurement has {key} {before.get(key)!r}, the other {after.get(key)!r}."
            raise HoldfastError(what, cure)
    sides = [{t["name"]: [i["id"] for i in t["items"]] for t in m["tasks"]} for m in (before, after)]
    name = next((n for n in {**sides[0], **sides[1]} if sides[0].get(n) != sides[1].get(n)), None)
    if name:
        what = f"The two measurements of {name!r} do not hold the same items, so they cannot be paired."
        raise HoldfastError(what, cure)
    later = {t["name"]: t for t in after["tasks"]}
    for b, a in ((t, later[t["name"]]) for t in before["tasks"]):
        for key in ("metric", "version"):
            if b.get(key) != a.get(key):
                what = f"One measurement of {b['name']!r} has {key} {b.get(key)!r}, the other {a.get(key)!r}."
                raise HoldfastError(what, cure)


def estimates(
    before: Sequence[Mapping] | None, after: Sequence[Mapping] | None, clusters: Sequence[str] | None = None
) -> Part:
    """before, after and difference of one task as Est dicts; a side that is missing is None."""
    part: Part = {"before": None, "after": None, "difference": None}
    if before is not None:
        part["before"] = stats.share(_correct(before), clusters).to_dict()
    if after is not None:
        part["after"] = stats.share(_correct(after), clusters).to_dict()
    if before is not None and after is not None:
        part["difference"] = stats.change(_correct(before), _correct(after), clusters).to_dict()
    return part


def ability(before: Part, after: Part | None, keep: float, required: bool = True) -> Part:
    """One ability of the report from its measurements (`measure.asking.score_suite`).

    kept: the one-sided 95 % bound of the share kept lies above `keep`. lost: the bound of the loss excludes 0 and the
    estimate lies below `keep`. Tasks whose base is not 2 standard errors above chance do not enter. Where so few items
    were asked that not even answers without any change would prove `keep`, an ability that nobody `required` can only
    raise an alarm: it is "no loss shown" instead of unclear, and never kept.
    """
    chance = {t["name"]: t["chance"] for t in before["tasks"]}
    rows = {t["name"]: t["items"] for t in before["tasks"]}
    clusters = {t["name"]: clusters_of(t) for t in before["tasks"]}
    metric = {t["name"]: t["metric"] for t in before["tasks"]}
    measurable = [n for n in rows if stats.measurable(_correct(rows[n]), clusters[n], chance[n])]
    later = {t["name"]: t["items"] for t in after["tasks"]} if after else {}
    if after:
        _check_pair(before, after)
    tasks = [
        {
            "name": name,
            "n": len(items),
            "chance": chance[name],
            "metric": metric[name],
            "status": None if name in measurable else "not measurable",
            **estimates(items, later.get(name) if after else None, clusters[name]),
        }
        for name, items in rows.items()
    ]
    part: Part = {"name": before["suite"], "margin": 1 - keep, "tasks": tasks, "retention": None}
    part["note"] = before.get("note")
    part |= {"curve": _curve(before, after), "facts": _facts(before, after), "sight": _sight(before, keep)}
    left_out = len(rows) - len(measurable)
    if left_out:
        part["note"] = f"{left_out} of {len(rows)} tasks are not measurable with this model and do not count"
    if not measurable:
        return {**part, "before": None, "after": None, "difference": None, "status": "not measurable"}
    pooled = {n: (_correct(rows[n]), _correct(later.get(n, rows[n])), clusters[n]) for n in measurable}
    part |= _macro(pooled)
    if after is None:
        return {**part, "after": None, "difference": None, "status": None}
    ratio = stats.retention(pooled, chance)
    if not ratio.defined:
        return {**part, "status": "not measurable"}
    part["retention"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    (base, _), base_draws, change, n = stats.macro_draws(pooled, chance)
    good = base_draws > 0
    verdict = stats.noninferiority_draws(change[good] / base_draws[good], 1 - keep, ratio.value - 1, n)
    margin = (1 - keep) * base * _plain(pooled, chance)
    whole = _all_items(pooled, margin)
    status, p_loss = verdict.status, max(verdict.p_loss, whole.p_loss)
    if status == "kept" and whole.p_loss == 1:
        status = whole.status  # that no item was lost is no proof either where there are few items
    if status == "lost" and p_loss >= ALPHA:
        status = "unclear"
    if status == "unclear" and not required and not _provable(pooled, margin):
        status = "no loss shown"
    return {**part, "status": status, "p_loss": p_loss}


def abilities(before: Sequence[Part], after: Sequence[Part], floors: Mapping[str, float], floor: float) -> list[Part]:
    """Every ability of two models' measurements of the same suites, judged together.

    An alarm goes off if any ability is lost, so the loss of each needs a p-value that survives Holm's correction over
    all of them; "kept" claims all of them at once and needs none (`stats.verdicts` says why).
    """
    parts = [
        ability(b, a, floors.get(b["suite"], floor), b["suite"] in floors) for b, a in zip(before, after, strict=True)
    ]
    return corrected(parts)


def corrected(parts: list[Part]) -> list[Part]:
    """Each "p_loss" adjusted for all of them, in place; what is lost only without that is unclear."""
    known = {p["name"]: p["p_loss"] for p in parts if p.get("p_loss") is not None}
    adjusted = stats.holm(known) if known else {}
    for p in parts:
        p["p_loss"] = adjusted.get(p["name"])
        if p["status"] == "lost" and p["name"] in adjusted and adjusted[p["name"]] >= ALPHA:
            p["status"] = "unclear"
    return parts


def _curve(before: Part, after: Part | None) -> Part | None:
    """Score by number of demonstrations, where the items say how many they had."""
    from holdfast.measure.suites.shots import by_shots

    sides = [by_shots([i for t in m["tasks"] for i in t["items"]]) for m in (before, after) if m]
    if not all(sides):
        return None
    drawn = [[stats.share(_correct(items)).to_dict() for items in side.values()] for side in sides]
    return {"shots": list(sides[0]), "before": drawn[0], "after": drawn[-1] if after else []}


def _facts(before: Part, after: Part | None) -> dict[str, list[float | None]]:
    """name -> [before, after] of the further figures."""
    first, second = facts_of(before), facts_of(after) if after else {}
    return {name: [value, second.get(name)] for name, value in first.items()}


def _sight(before: Part, keep: float) -> Part | None:
    seen = can_see(before, keep)
    return None if seen is None else {"loss": seen.loss, "share": seen.share}


def only_after(after: Part, keep: float) -> Part:
    """One ability of a tuned model whose base was not measured: scores in the column 'after', no judgement."""
    part = ability(after, None, keep)
    for one in (part, *part["tasks"]):
        one["before"], one["after"] = None, one["before"]
    part["facts"] = {name: [None, value] for name, (value, _) in part["facts"].items()}
    if part["curve"]:
        part["curve"] |= {"before": [], "after": part["curve"]["before"]}
    return {**part, "status": None}


def _macro(pooled: Mapping[str, Any]) -> Part:
    """Plain (not chance-corrected) means over tasks, each with an interval that stays within the scores' bounds."""
    return {
        "before": stats.average([(b, c) for b, _, c in pooled.values()]).to_dict(),
        "after": stats.average([(t, c) for _, t, c in pooled.values()]).to_dict(),
        "difference": stats.average_change(list(pooled.values())).to_dict(),
    }


def _plain(pooled: Mapping[str, Any], chance: Mapping[str, float]) -> float:
    """What a difference of chance-corrected scores is worth in plain ones, over all items."""
    sizes = {name: len(base) for name, (base, _, _) in pooled.items()}
    return sum(size * (1 - chance[name]) for name, size in sizes.items()) / sum(sizes.values())


def _provable(pooled: Mapping[str, Any], margin: float) -> bool:
    """Whether a tuned model that answers as the base does would be called kept."""
    return _all_items({n: (b, b, c) for n, (b, _, c) in pooled.items()}, margin).status == "kept"


def _all_items(pooled: Mapping[str, Any], margin: float) -> stats.Verdict:
    """The test of `stats` on all items as one: the sign test for 0/1 scores, t over clusters for the others.

    The bootstrap's tail is too thin where an ability has few items (measured: docs/ruler.md), so "lost" needs both.
    """
    base = [x for b, _, _ in pooled.values() for x in b]
    tuned = [x for _, t, _ in pooled.values() for x in t]
    groups = [f"{name}/{c}" for name, (b, _, cs) in pooled.items() for c in (cs or range(len(b)))]
    return stats.noninferiority(base, tuned, margin, groups)


def verdict(abilities: Sequence[Part], task: Part | None, floors: Collection[str] = ()) -> Part:
    """The sentence on top of the report. floors: what somebody asked to keep: unseen it is not kept."""
    known = [a for a in abilities if a["status"] in ("kept", "lost", "unclear")]
    blind = ", ".join(str(a["name"]) for a in abilities if a["status"] == "not measurable" and a["name"] in floors)
    few = ", ".join(str(a["name"]) for a in abilities if a["status"] == "no loss shown")
    rest = f" No loss shown, but too few items to prove more: {few}." if few else ""
    rest += f" Not measurable with this model, so nothing is said of it: {blind}." if blind else ""
    if not known:
        sentence = f"No ability could be checked with this model and these suites.{rest}"
        return {"status": "not checked", "sentence": sentence}
    status = next(s for s in WORDS if any(a["status"] == s for a in known))
    names = ", ".join(ability_words(a) for a in known if a["status"] == status)
    gain, said = task_words(task or {}), f"{WORDS[status]}: {names}.{rest}"
    if blind and status == "kept":
        status, said = "unclear", f"{WORDS['unclear']}: {blind}. {said}"
    return {"status": status, "sentence": f"{said} {gain}".rstrip()}
