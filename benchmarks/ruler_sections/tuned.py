"""Verdicts on real models: noise, planted damage, and seeds of a training."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ruler_sections.lab import HERE, Data, Lab, items_of, judged, measured
from ruler_sections.simulated import as_measurement


def noised(model: Any, master: Sequence[Any], strength: float, seed: int) -> float:
    """Put master + strength * rms(tensor) * N(0, 1) into the model; returns the share of stored weights it changed."""
    import torch

    dice, changed, total = torch.Generator().manual_seed(seed), 0, 0
    with torch.no_grad():
        for p, w in zip(model.parameters(), master, strict=True):
            noise = torch.randn(w.shape, generator=dice)
            new = (w + strength * w.square().mean().sqrt() * noise).to(p.dtype)
            changed, total = changed + int((new != w.to(p.dtype)).sum()), total + new.numel()
            p.copy_(new)
    return changed / total


def _weights(lab: Lab) -> list[Any]:
    """The model's weights in fp32."""
    return [p.detach().clone() for p in lab.load("float32")[0].parameters()]


def noise(lab: Lab) -> Data:
    """Base against base plus a breath of noise: nothing is lost, so nothing may be called lost."""
    master, (model, tokenizer) = _weights(lab), lab.load()
    few = (lab.size(12, 2), lab.size(8, 1))
    before, rows = measured(model, tokenizer, "in-context", *few), []
    for seed in range(lab.size(20, 2)):
        changed = noised(model, master, 1e-4, seed)
        after = measured(model, tokenizer, "in-context", *few)
        flipped = [a["correct"] != b["correct"] for a, b in zip(items_of(before), items_of(after), strict=True)]
        rows.append({"changed_weights": changed, "flipped": sum(flipped) / len(flipped), **judged(before, after)})
    return {"strength": 1e-4, "items": len(items_of(before)), "dtype": str(model.dtype), "repetitions": rows}


STRENGTHS, SCALES = (0.02, 0.05, 0.1, 0.2, 0.4), (0.95, 0.9, 0.8, 0.6)


def damage(lab: Lab) -> Data:
    """Planted damage of growing strength, and real tunings: does the verdict follow?"""
    master, (model, tokenizer) = _weights(lab), lab.load()
    few = (lab.size(24, 2), lab.size(8, 1))
    before, rows = measured(model, tokenizer, "in-context", *few), []
    for strength in lab.size(STRENGTHS, (0.02, 0.4)):
        noised(model, master, strength, 0)
        rows.append({"damage": "noise", "strength": strength})
        rows[-1] |= judged(before, measured(model, tokenizer, "in-context", *few))
    for scale in lab.size(SCALES, (0.6,)):
        _scaled(model, master, scale)
        rows.append({"damage": "middle layers scaled", "strength": scale})
        rows[-1] |= judged(before, measured(model, tokenizer, "in-context", *few))
    return {"items": len(items_of(before)), "rows": rows, "tunings": _tunings(lab.results)}


def _scaled(model: Any, master: Sequence[Any], scale: float) -> None:
    """Multiply the block matrices of the middle third of the layers."""
    import torch

    num = model.config.num_hidden_layers
    middle = [f".layers.{n}." for n in range(num // 3, max(num // 3 + 1, 2 * num // 3))]
    with torch.no_grad():
        for (name, p), w in zip(model.named_parameters(), master, strict=True):
            hit = p.ndim == 2 and any(m in f".{name}" for m in middle)
            p.copy_((w * scale if hit else w).to(p.dtype))


def runs_in(folder: Path) -> dict[tuple[str, str], list[Data]]:
    """(data, method and rate) -> runs of benchmarks/leaderboard.py, one per seed; of two, the one made later."""
    found: dict[tuple[str, str, int], Data] = {}
    for path in (*sorted(folder.glob("before/*/*.json")), *sorted(folder.glob("*/*.json"))):
        run = json.loads(path.read_text(encoding="utf-8"))
        held = {name: [int(c) for c in scores] for name, scores in run["suites"]["in-context"].items()}
        label = run["method"] + ("" if run["method"] == "base" else f" at {run['rate']:g}")
        chance = run.get("chance", {}).get("in-context")
        found[run["task"], label, run["seed"]] = {"held_out": held, "chance": chance}
    out: dict[tuple[str, str], list[Data]] = {}
    for (data, label, _), run in found.items():
        out.setdefault((data, label), []).append(run)
    return out


def _tunings(folder: Path) -> list[Data]:
    """The verdict on every real tuning there is, from its recorded answers."""
    runs = runs_in(folder)
    rows = []
    for (data, method), found in runs.items():
        if method != "base" and (data, "base") in runs:
            (base, *_), run = runs[data, "base"], found[0]
            sides = [as_measurement("in-context", r["held_out"], base["chance"]) for r in (base, run)]
            rows.append({"data": data, "method": method, **judged(*sides)})
    return sorted(rows, key=lambda r: (r["data"], -(r["kept"] or {"value": 0})["value"]))


def seeds(lab: Lab) -> Data:
    """How far runs of one recipe differ by seed, beside the item-level interval of each."""
    runs = runs_in(lab.results)
    several = {k: v for k, v in runs.items() if len(v) > 1 and k[1] != "base" and (k[0], "base") in runs}
    rows = [_spread(f"{d}, {m}", runs[d, "base"][0], found) for (d, m), found in several.items()]
    if not any(len(found) > 2 for found in several.values()):
        base, found = _trained(lab, 3)
        rows.append(_spread(f"tickets, LoRA, {lab.size(40, 2)} steps", base, found))
    return {"rows": rows, "twins": _twins(runs)}


HARMLESS = ("default", "anchor (weight 1), lora", "anchor (weight 1), full", "in-context mix", "promot")


def _twins(runs: Mapping[tuple[str, str], Sequence[Data]]) -> list[Data]:
    """The verdict between every two seeds of a tuning that may be harmless, each way round.

    "harmed": one of the seeds has itself lost against the base.
    """
    rows = []
    for (data, method), found in runs.items():
        if method.split(" at ")[0] in HARMLESS and len(found) > 1 and (data, "base") in runs:
            bare = runs[data, "base"][0]
            base, *seeds = (as_measurement("in-context", r["held_out"], bare["chance"]) for r in (bare, *found))
            harmed = any(judged(base, one)["status"] == "lost" for one in seeds)
            pairs = itertools.permutations(seeds, 2)
            rows += [{"data": data, "method": method, "harmed": harmed, **judged(*pair)} for pair in pairs]
    return rows


def _spread(recipe: str, base: Data, runs: Sequence[Data]) -> Data:
    from holdfast.measure import stats

    def flat(run: Data) -> list[float]:
        return [float(x) for task in sorted(base["held_out"]) for x in run["held_out"][task]]

    first, rest = flat(base), [flat(r) for r in runs]
    paired = [stats.paired(first, r) for r in rest]
    return {
        "recipe": recipe,
        "items": len(first),
        "runs": [e.to_dict() for e in paired],
        "over_seeds": stats.seeds([e.value for e in paired]).to_dict(),
        "hierarchical": stats.hierarchical([(first, r) for r in rest]).to_dict(),
        "changed_between_runs": float(np.mean([x != y for x, y in zip(rest[0], rest[1], strict=True)])),
    }


def _trained(lab: Lab, num: int) -> tuple[Data, list[Data]]:
    """The base and `num` seeds of one short LoRA tuning on the shipped tickets, as `_spread` reads them."""
    few = (lab.size(24, 2), lab.size(8, 1))

    def answers(model: Any, tokenizer: Any) -> Data:
        tasks = measured(model, tokenizer, "in-context", *few)["tasks"]
        return {"held_out": {t["name"]: [i["correct"] for i in t["items"]] for t in tasks}}

    base = answers(*lab.load())
    return base, [answers(*_tuned(lab, seed)) for seed in range(num)]


def _tuned(lab: Lab, seed: int) -> tuple[Any, Any]:
    from holdfast import methods as M
    from holdfast.data.rows import read_rows
    from holdfast.data.tokens import tokenize
    from holdfast.hosts.plain import Training, train
    from holdfast.plan import Host, Plan
    from holdfast.services import Context
    from holdfast.session import Session

    model, tokenizer = lab.load()
    compute, steps, batch = model.dtype, lab.size(40, 2), lab.size(8, 2)
    asked = {"prompt": "{text}\nQueue:", "completion": " {queue}"}
    rows = read_rows("holdfast:tickets/train.jsonl", **asked, base_dir=HERE, tokenizer=tokenizer)
    plan = Plan([M.LoRA()])
    ctx = Context(model, tokenizer, seed, rows, total_steps=steps, max_length=1024)
    plan.check(Host("benchmark"), ctx)
    session = Session(plan, model, ctx, compute_dtype=compute, knows_rows=True)
    mix = session.mix([tokenize(r, tokenizer, 1024) for r in rows])
    order = mix.draw(seed)
    session.prepare([next(order) for _ in range(steps * batch)])
    train(session, mix, Training(steps, batch, learning_rate=3e-4, seed=seed, autocast=compute, save_steps=0))
    session.merge()
    return session.finished_model(compute)[0].eval(), tokenizer
