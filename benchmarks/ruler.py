"""Is the ruler straight? Measures the measuring itself. Resumable: one JSON per section in benchmarks/results/ruler/.

    python benchmarks/ruler.py run                    # measures the sections that have no JSON yet
    python benchmarks/ruler.py run --only simulated   # one of them; delete its JSON to measure it again
    python benchmarks/ruler.py page                   # writes docs/ruler.md from the JSON files

`--smoke` makes everything tiny, to see that it works; such numbers never reach the page and need their own --out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
OUT, RESULTS, PAGE = HERE / "results" / "ruler", HERE / "results", HERE.parent / "docs" / "ruler.md"
KEEP, ALPHA = 0.95, 0.05
Data = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """What a section works with: a model, and whether all sizes are tiny."""

    model: str = "smollm2-135m"
    smoke: bool = False
    results: Path = RESULTS

    def load(self, dtype: str = "auto") -> tuple[Any, Any]:
        from holdfast import models

        return models.load(self.model, dtype=dtype)

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.smoke else full


def suite_of(name: str, tokenizer: Any, limit: int | None = None, shots: int = 8) -> Any:
    from holdfast.measure.probe import Ask
    from holdfast.measure.suites import build

    return build(name, Ask(tokenizer, num_fewshot=shots, limit=limit))


def measured(model: Any, tokenizer: Any, name: str, limit: int | None, shots: int = 8) -> Data:
    """A measurement made now: no cache."""
    from holdfast.measure.asking import score_suite

    return score_suite(model, tokenizer, suite_of(name, tokenizer, limit, shots))


def judged(before: Data, after: Data) -> Data:
    """The verdict on one ability, short."""
    from holdfast.measure.compare import abilities

    (part,) = abilities([before], [after], {}, KEEP)
    pair = {f"{side}_score": part[side] and part[side]["value"] for side in ("before", "after")}
    return {"status": part["status"], "kept": part["retention"], "p_loss": part["p_loss"], **pair}


def items_of(measurement: Data) -> list[Data]:
    return [i for t in measurement["tasks"] for i in t["items"]]


# ---------------------------------------------------------------- 1 zero


def zero(lab: Lab) -> Data:
    """The base against itself: loaded and scored twice."""
    from holdfast.measure.compare import abilities
    from holdfast.measure.suites import DEFAULT

    runs = []
    for _ in range(2):
        model, tokenizer = lab.load()
        runs.append([measured(model, tokenizer, n, lab.size(None, 2), lab.size(8, 1)) for n in DEFAULT])
        del model
        gc.collect()
    parts = abilities(*runs, {}, KEEP)
    return {"suites": [_same(a, b, p) for a, b, p in zip(*runs, parts, strict=True)]}


def _same(first: Data, second: Data, part: Data) -> Data:
    pairs = list(zip(items_of(first), items_of(second), strict=True))
    gaps = [abs(a[k] - b[k]) for a, b in pairs for k in ("correct", "logprob") if k in a]
    changed = sum(a != b for a, b in pairs)
    known = {"suite": first["suite"], "items": len(pairs), "changed": changed, "largest": max(gaps)}
    return {**known, "status": part["status"]}


# ---------------------------------------------------------------- 2 harness

SOURCES = {  # kind of request -> (suite, kind of probe, groups, items of each)
    "log-likelihood (greedy flag)": ("in-context", "exact", 5, 12),
    "multiple choice": ("knowledge", "choice", 1, 60),
    "multiple choice, acc_norm": ("safety", "choice", 2, 30),
    "multiple choice, ten options": ("calibration", "calibrated", 2, 30),
    "rolling perplexity": ("language", "likelihood", 5, 12),
}


def harness(lab: Lab) -> Data:
    """Our bridge, and our own scores, against the harness's HFLM on identical items in fp32, batch size 1."""
    from lm_eval.models.huggingface import HFLM

    from holdfast.measure.lm_eval import HoldfastLM

    model, tokenizer = lab.load("float32")
    both = [HoldfastLM(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)]
    rows = {}
    with tempfile.TemporaryDirectory() as folder, _datasets_in(folder):
        for n, kind in enumerate(SOURCES):
            rows[kind] = _exported(lab, kind, both, Path(folder) / str(n))
        for kind, write in (("few-shot sampling (num_fewshot 2)", _choice_task), ("greedy generation", _spoken_task)):
            path, shots = write(Path(folder), lab.size(60, 4), lab.size(12, 2))
            got, want = (evaluated(lm, [path], shots)[0] for lm in both)
            rows[kind] = agreement(got, want)
    return {"kinds": rows}


@contextmanager
def _datasets_in(folder: str) -> Iterator[None]:
    """The datasets library copies what it reads; the copies go with the folder."""
    import datasets

    usual = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(Path(folder) / "cache")
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual


def _exported(lab: Lab, kind: str, both: Sequence[Any], folder: Path) -> Data:
    from holdfast.measure.asking import score_suite
    from holdfast.measure.export import export_suite
    from holdfast.measure.probe import Suite

    name, probe_kind, groups, each = SOURCES[kind]
    lm, each = both[0], lab.size(each, 2)
    whole = suite_of(name, lm.tokenizer, each, lab.size(8, 1))
    picked = {g.name: [p for p in whole.probes if p.task == g.name][:each] for g in whole.groups}
    names = [n for n, ps in picked.items() if all(p.kind == probe_kind and _fits(kind, p) for p in ps)][:groups]
    suite = Suite(
        name,
        tuple(g for g in whole.groups if g.name in names),
        tuple(p for n in names for p in picked[n]),
        whole.settings,
    )
    paths = [str(folder / f"{made.task}.yaml") for made in export_suite(suite, folder)]
    got, want = ([s for task in evaluated(lm, paths) for s in task] for lm in both)
    own = items_of(score_suite(lm.model, lm.tokenizer, suite))
    right = [(i.get("hit", i["correct"]), _marks(s)) for i, s in zip(own, want, strict=True)]
    return agreement(got, want) | {"own_equal": sum(a == b[0] for a, b in right if b)}


def _fits(kind: str, probe: Any) -> bool:
    return (probe.answer_lengths is not None) == kind.endswith("acc_norm")


def evaluated(lm: Any, paths: Sequence[str], shots: int | None = None) -> list[list[Data]]:
    """The harness's samples of every task, in the order of `paths`, items in the order of their file."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    found: Any = simple_evaluate(
        model=lm, tasks=list(paths), num_fewshot=shots, task_manager=manager, bootstrap_iters=0
    )
    return [sorted(found["samples"][Path(p).stem], key=lambda s: s["doc_id"]) for p in paths]


def _marks(sample: Data) -> list[float]:
    return [float(sample[m]) for m in sample["metrics"] if m in ("acc", "acc_norm", "acc_bytes", "exact_match")]


def _read(sample: Data) -> tuple[list[Any], list[float]]:
    """(what was decided, log-likelihoods) of one item."""
    answers = [a for group in sample["resps"] for a in group]
    decided = [_marks(sample), [a[1] if isinstance(a, tuple | list) else a for a in answers if type(a) is not float]]
    return decided, [a[0] if isinstance(a, tuple | list) else a for a in answers if not isinstance(a, str)]


def agreement(got: Sequence[Data], want: Sequence[Data]) -> Data:
    """Items, how many are decided alike, and the largest difference of a log-likelihood (nats)."""
    pairs = [(_read(a), _read(b)) for a, b in zip(got, want, strict=True)]
    gaps = [abs(x - y) for (_, xs), (_, ys) in pairs for x, y in zip(xs, ys, strict=True)]
    sums = [abs(y) for _, (_, ys) in pairs for y in ys]
    return {
        "items": len(pairs),
        "equal": sum(a == b for (a, _), (b, _) in pairs),
        "right": sum(any(_marks(s)) for s in want),
        "largest": max(gaps, default=None),
        "typical_logprob": statistics.median(sums) if sums else None,
    }


def _yaml(folder: Path, name: str, splits: Mapping[str, list[Data]], **config: Any) -> str:
    """A task file and its data; JSON is YAML."""
    for split, rows in splits.items():
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    files = {split: (folder / f"{name}.{split}.jsonl").as_posix() for split in splits}
    source = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**source, **config, "metadata": {"version": 1}}), encoding="utf-8")
    return str(path)


def _choice_task(folder: Path, items: int, _: int) -> tuple[str, int]:
    from holdfast.measure.tasks import held_out_tasks

    (task,) = held_out_tasks(("topic",))
    rows = [{"q": x, "labels": list(task.labels or ()), "a": y} for x, y in task.items]
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    path = _yaml(
        folder,
        "ruler_choice",
        {"train": rows[:20], "test": rows[20 : 20 + items]},
        fewshot_split="train",
        output_type="multiple_choice",
        doc_to_text=f"{task.input_name}: {{{{q}}}}\n{task.output_name}:",
        doc_to_choice="labels",
        doc_to_target="{{labels.index(a)}}",
        metric_list=metrics,
    )
    return path, 2


def _spoken_task(folder: Path, _: int, items: int) -> tuple[str, int]:
    from holdfast.measure.tasks import held_out_tasks

    tasks = held_out_tasks()[:items]
    rows = [{"q": f"{t.instruction}\n\n{t.input_name}: {x}", "a": y} for t in tasks for x, y in t.items[:1]]
    path = _yaml(
        folder,
        "ruler_spoken",
        {"test": rows},
        output_type="generate_until",
        doc_to_text="{{q}}\nAnswer:",
        doc_to_target="a",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return path, 0


# ---------------------------------------------------------------- 3 invariance


def invariance(lab: Lab) -> Data:
    """One set of requests, scored in ways that must not matter."""
    return {dtype: _ways(lab, dtype) for dtype in ("float32", "bfloat16")}


def _ways(lab: Lab, dtype: str) -> Data:
    from holdfast.measure.scorer import Scorer

    model, tokenizer = lab.load(dtype)
    asked = suite_of("in-context", tokenizer, lab.size(6, 1), lab.size(8, 1)).probes
    asked += suite_of("knowledge", tokenizer, lab.size(24, 2)).probes
    scorer = Scorer(model, tokenizer)
    encoded = [scorer.encode((p.context, a)) for p in asked for a in p.answers]
    order = np.random.default_rng(0).permutation(len(encoded))
    mixed = dict(zip(order, scorer.score_tokens([encoded[n] for n in order]), strict=True))
    padded = Scorer(model, tokenizer)
    padded._walk_tree = padded._walk_padded  # the way of models whose attention takes no tree
    ways = {
        "again": scorer.score_tokens(encoded),
        "batch_tokens 128": Scorer(model, tokenizer, batch_tokens=128).score_tokens(encoded),
        "batch_tokens 512": Scorer(model, tokenizer, batch_tokens=512).score_tokens(encoded),
        "items shuffled": [mixed[n] for n in range(len(encoded))],
        "no shared prefixes, one by one": [_alone(model, *e) for e in encoded],
        "no shared prefixes, right-padded batches": padded.score_tokens(encoded),
    }
    usual = scorer.score_tokens(encoded)
    return {"requests": len(encoded), "ways": {name: _apart(asked, usual, s) for name, s in ways.items()}}


def _alone(model: Any, ids: list[int], start: int) -> Any:
    """One request in one plain forward: no tree, no cache, no mask, no padding."""
    import torch

    from holdfast.measure.scorer import Score

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids[:-1]], device=model.device), use_cache=False).logits
    logp = logits[0, start - 1 :].float().log_softmax(-1)
    target = torch.tensor(ids[start:], device=logp.device)
    picked = logp.gather(1, target[:, None]).double().sum()
    return Score(float(picked), bool((logp.argmax(-1) == target).all()), len(target))


def _apart(probes: Sequence[Any], usual: Sequence[Any], other: Sequence[Any]) -> Data:
    a, b = decisions(probes, usual), decisions(probes, other)
    gaps = [abs(x.logprob - y.logprob) for x, y in zip(usual, other, strict=True)]
    return {"decisions": len(a), "differ": sum(x != y for x, y in zip(a, b, strict=True)), "largest": max(gaps)}


def decisions(probes: Sequence[Any], scores: Sequence[Any]) -> list[int]:
    """What each probe's score hangs on: the greedy flag, or the likeliest answer."""
    rest, out = iter(scores), []
    for p in probes:
        mine = [next(rest) for _ in p.answers]
        out.append(int(mine[0].greedy) if p.kind == "exact" else int(np.argmax([s.logprob for s in mine])))
    return out


# ---------------------------------------------------------------- 4 simulated

# accuracy of SmolLM2-135M-Instruct on the 20 held-out tasks, and chance (benchmarks/results, 24 items each)
BASES = (
    *((0.67, 0.0), (0.25, 0.0), (0.25, 0.0), (0.75, 0.10), (0.88, 0.0), (0.42, 0.0), (0.58, 0.0), (0.04, 0.0)),
    *((0.83, 0.0), (0.83, 0.0), (0.83, 0.0), (0.97, 0.0), (0.58, 0.0), (0.62, 0.0), (0.88, 0.0), (0.97, 0.5)),
    *((0.67, 0.0), (0.71, 0.25), (0.62, 0.5), (0.46, 0.0)),
)
SHAPES = ((20, 48), (4, 12), (5, 6), (2, 120), (6, 6), (10, 24), (4, 42))  # tasks x items of the default suites
DISCORDANCES, LIMITS, LOSSES = (0.05, 0.10, 0.20), (12, 24, 48, 96), range(1, 16)


@dataclass(frozen=True)
class World:
    """One ability with a known truth: `limit` items of each task, P(item changes), true loss of each task."""

    tasks: int
    limit: int
    discordance: float
    loss: float = 0.0
    relative: bool = False  # the loss is a share of what the base has above chance

    def cells(self) -> np.ndarray:
        """(T, 4) probabilities of (base, tuned) = 11, 10, 01, 00. No task falls below chance."""
        return np.array([self._cell(*BASES[n % len(BASES)]) for n in range(self.tasks)])

    def _cell(self, p: float, chance: float) -> tuple[float, float, float, float]:
        lost = self.loss * (p - chance) if self.relative else min(self.loss, p - chance)
        gain = max(0.0, min((self.discordance - lost) / 2, 1 - p, p - lost))
        return p - gain - lost, gain + lost, gain, 1 - p - gain

    @property
    def chance(self) -> np.ndarray:
        return np.array([BASES[n % len(BASES)][1] for n in range(self.tasks)])

    def draw(self, reps: int, rng: np.random.Generator) -> np.ndarray:
        """(reps, T, 4) counts of items."""
        return rng.multinomial(self.limit, self.cells(), size=(reps, self.tasks))

    def truth(self) -> Data:
        """What is true on average over the tasks: changed items, loss in points and as a share of the ability."""
        _, lost, gained, _ = cells = self.cells().T
        above = (cells[0] + lost - self.chance) / (1 - self.chance)
        share = float(((lost - gained) / (1 - self.chance)).sum() / above.sum())
        return {"changed": float((lost + gained).mean()), "loss": float((lost - gained).mean()), "share": share}


def judge(counts: np.ndarray, chance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The verdict of `compare.ability` on (R, T, 4) counts: (measurable, p_loss, lower bound of the share) of each.

    The bootstrap's distribution is taken as normal with the bootstrap's own covariance, so that its quantiles need no
    draws: p_loss is a normal tail, and the bound of the ratio is Fieller's. `simulated` reports how often the status
    equals that of `compare.abilities` with its 4000 draws.
    """
    n = counts.sum(-1)
    p, d = (counts[..., 0] + counts[..., 1]) / n, (counts[..., 2] - counts[..., 1]) / n
    weight = _measurable(p, n, chance) / (1 - chance)
    many = np.maximum((weight > 0).sum(-1), 1)
    var_d = (counts[..., 1] + counts[..., 2]) / n - d * d
    cov = -counts[..., 1] / n - p * d  # base * difference is -1 where an item was lost
    b = (weight * (p - chance)).sum(-1) / many
    diff = (weight * d).sum(-1) / many
    vb, vd, c = ((weight**2 * v / (n - 1)).sum(-1) / many**2 for v in (p * (1 - p), var_d, cov))
    known = (weight > 0).any(-1) & (b >= 2 * np.sqrt(vb)) & (b > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        from scipy.special import ndtr, ndtri

        p_loss = np.where(vd > 0, ndtr(diff / np.sqrt(vd)), (diff >= 0).astype(float))
        p_loss = np.maximum(p_loss, sign_test(counts, weight > 0))
        z2 = float(ndtri(1 - ALPHA)) ** 2
        a2, a1, a0 = b * b - z2 * vb, b * diff - z2 * c, diff * diff - z2 * vd
        lower = (a1 - np.sqrt(np.maximum(a1 * a1 - a2 * a0, 0))) / a2
    return known, p_loss, np.where(known, 1 + lower, np.nan), np.where(known, 1 + diff / np.where(b > 0, b, 1), np.nan)


def _measurable(p: np.ndarray, n: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """`stats.measurable` for 0/1 items without clusters."""
    wilson = (p + 2 / n - 2 * np.sqrt(p * (1 - p) / n + 1 / n**2)) / (1 + 4 / n)
    return (wilson > chance) & (p > chance) & (p - chance >= 2 * np.sqrt(p * (1 - p) / (n - 1)))


def sign_test(counts: np.ndarray, used: np.ndarray) -> np.ndarray:
    """(R,) one-sided p of the exact sign test on the items of all measurable tasks: "lost" needs it too."""
    from scipy.special import bdtr

    lost, gained = ((counts[..., k] * used).sum(-1) for k in (1, 2))
    return bdtr(gained, lost + gained, 0.5)


def bootstrapped(counts: np.ndarray, chance: np.ndarray, p_loss: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """p_loss of `judge`, drawn as `stats.macro_draws` does where it is small: few items have no normal tail."""
    out, n = p_loss.copy(), counts.sum(-1)
    p = (counts[..., 0] + counts[..., 1]) / n
    weight = _measurable(p, n, chance) / (1 - chance)
    for rep in np.flatnonzero((p_loss < ALPHA) & (weight > 0).any(-1)):
        used = weight[rep] > 0
        row, size, w = counts[rep, used], n[rep, used], weight[rep, used]
        cells = np.stack([row[:, 1], row[:, 2], row[:, 0] + row[:, 3]], axis=1) / size[:, None]
        drawn = rng.multinomial(size, cells, size=(4000, used.sum()))
        d, at = (drawn[..., 1] - drawn[..., 0]) / size, cells[:, 1] - cells[:, 0]
        total = (w * (at + (d - at) * np.sqrt(size / (size - 1)))).sum(1)
        out[rep] = (1 + (total >= -1e-12).sum()) / 4001
    return np.maximum(out, sign_test(counts, weight > 0))


def statuses(verdicts: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
    """(R, A) status of abilities judged together, Holm as in `compare.abilities`."""
    known, p, lower, kept = (np.stack(x, axis=1) for x in zip(*verdicts, strict=True))
    order = np.argsort(np.where(known, p, np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    raw = np.take_along_axis(np.where(known, p, 0.0), order, 1)
    scaled = np.minimum(1.0, (known.sum(1, keepdims=True) - np.arange(p.shape[1])) * raw)
    adjusted = np.take_along_axis(np.maximum.accumulate(scaled, axis=1), rank, 1)
    out = np.where(lower > KEEP, "kept", "unclear")
    out = np.where((adjusted < ALPHA) & (kept < KEEP) & (lower <= KEEP), "lost", out)
    return np.where(known, out, "not measurable")


def simulated(lab: Lab) -> Data:
    """False alarms and power on made-up items whose truth is known."""
    rng, reps = np.random.default_rng(0), lab.size(10_000, 200)
    limits, losses = lab.size(LIMITS, (12,)), lab.size(LOSSES, (0, 10))
    alone = [_rates([World(20, 48, d)], reps, rng) for d in DISCORDANCES]
    joint = [_rates([World(*s, d) for s in SHAPES], lab.size(4000, 50), rng) for d in DISCORDANCES]
    edge = [_rates([World(20, 48, d, 1 - KEEP, True)], reps, rng) for d in DISCORDANCES]
    curve = [
        {"limit": n, **_rates([World(20, n, d, x / 100)], lab.size(2000, 100), rng)}
        for n in limits
        for d in DISCORDANCES[1:]
        for x in losses
    ]
    return {
        "repetitions": reps,
        "joint_repetitions": lab.size(4000, 50),
        "curve_repetitions": lab.size(2000, 100),
        "shapes": SHAPES,
        "alone": alone,
        "joint": joint,
        "edge": edge,
        "curve": curve,
        "direct": [_direct(d, lab.size(15, 2), rng) for d in DISCORDANCES[1:]],
        "sight": [_sight(n, curve, rng) for n in limits],
    }


def _rates(worlds: Sequence[World], reps: int, rng: np.random.Generator) -> Data:
    """Shares of repetitions in which any ability is lost, and in which the first one is kept."""
    drawn = [w.draw(reps, rng) for w in worlds]
    verdicts = [judge(c, w.chance) for c, w in zip(drawn, worlds, strict=True)]
    if len(worlds) > 1:  # small ones among them
        parts = zip(verdicts, drawn, worlds, strict=True)
        verdicts = [(v[0], bootstrapped(c, w.chance, v[1], rng), *v[2:]) for v, c, w in parts]
    found = statuses(verdicts)
    return {
        "discordance": worlds[0].discordance,
        "asked_loss": worlds[0].loss,
        **worlds[0].truth(),
        "any_lost": float((found == "lost").any(1).mean()),
        "kept": float((found[:, 0] == "kept").mean()),
        "unclear": float((found[:, 0] == "unclear").mean()),
        "each_lost": [float(x) for x in (found == "lost").mean(0)],
    }


def measurement(counts: np.ndarray, chance: np.ndarray, name: str = "made up") -> tuple[Data, Data]:
    """(T, 4) counts as two measurements of the same items."""
    sides = []
    for marks in ((1, 1, 0, 0), (1, 0, 1, 0)):
        scores = [np.repeat(marks, row) for row in counts]
        sides.append(_as_measurement(name, {str(n): s for n, s in enumerate(scores)}, dict(enumerate(chance))))
    return sides[0], sides[1]


def _as_measurement(name: str, tasks: Mapping[str, Sequence[int]], chance: Mapping[Any, float]) -> Data:
    """Marks by task in the shape of `score_suite`."""
    known = {str(k): float(v) for k, v in chance.items()}
    return {
        "suite": name,
        "tasks": [
            {
                "name": task,
                "version": 1,
                "chance": known[task],
                "metric": "exact",
                "items": [{"id": f"{task}/{n}", "cluster": "", "correct": int(x)} for n, x in enumerate(marks)],
            }
            for task, marks in tasks.items()
        ],
    }


def _direct(discordance: float, reps: int, rng: np.random.Generator) -> Data:
    """The quick verdict beside `compare.abilities` itself, on all abilities; a third of the repetitions has a loss."""
    from holdfast.measure.compare import abilities

    same, total, alarms, calm = 0, 0, 0, 0
    for rep in range(reps):
        worlds = [World(*s, discordance, 0.0 if rep % 3 else 0.06) for s in SHAPES]
        drawn = [w.draw(1, rng) for w in worlds]
        quick = statuses([judge(c, w.chance) for c, w in zip(drawn, worlds, strict=True)])[0]
        pairs = [measurement(c[0], w.chance, f"a{n}") for n, (c, w) in enumerate(zip(drawn, worlds, strict=True))]
        parts = abilities([p[0] for p in pairs], [p[1] for p in pairs], {}, KEEP)
        same += sum(p["status"] == q for p, q in zip(parts, quick, strict=True))
        total, calm = total + len(parts), calm + (rep % 3 > 0)
        alarms += rep % 3 > 0 and any(p["status"] == "lost" for p in parts)
    return {"discordance": discordance, "verdicts": total, "same": same, "without_loss": calm, "alarms": int(alarms)}


def _sight(limit: int, curve: Sequence[Data], rng: np.random.Generator) -> Data:
    """What `measure.sight` promises, beside the simulated loss that is called lost nine times in ten."""
    from holdfast.measure.sight import DISCORDANT, can_see

    world = World(20, limit, DISCORDANT)
    seen = can_see(measurement(world.draw(1, rng)[0], world.chance)[0], KEEP)
    line = [c for c in curve if c["limit"] == limit and c["discordance"] == DISCORDANT]
    rates, losses = [c["any_lost"] for c in line], [c["loss"] for c in line]
    found = float(np.interp(0.9, np.maximum.accumulate(rates), losses)) if max(rates) >= 0.9 else None
    return {"limit": limit, "promised": seen and seen.loss, "share": seen and seen.share, "simulated": found}


# ---------------------------------------------------------------- intervals

CLUSTERS = (5, 10, 30)
TRUTHS = (0.02, 0.1, 0.5, 0.9, 0.98)


def _spread_out(p: float, g: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(g,) draws from a beta with mean p: strength 1 lies at 0 and 1 mostly, 20 near p."""
    return rng.beta(strength * p, strength * (1 - p), g)


def _shared(p: float, g: int, rng: np.random.Generator) -> np.ndarray:
    """(g, 4) 0/1 scores; the four of a cluster are correlated by 0.3."""
    return (rng.random((g, 4)) < _spread_out(p, g, 0.7 / 0.3, rng)[:, None]).astype(float)


KINDS: dict[str, Callable[[float, int, np.random.Generator], np.ndarray]] = {  # -> (clusters, items in each)
    "0/1": lambda p, g, rng: (rng.random((g, 1)) < p).astype(float),
    "0/1, four in a cluster": _shared,
    "0, 1/2, 1": lambda p, g, rng: rng.binomial(2, p, (g, 1)) / 2,
    "0, 1/2, 1, three in a cluster": lambda p, g, rng: rng.binomial(2, p, (g, 3)) / 2,
    "graded, close together": lambda p, g, rng: _spread_out(p, g, 20, rng)[:, None],
    "graded, nearly all at 0 or 1": lambda p, g, rng: _spread_out(p, g, 1, rng)[:, None],
}


def intervals(lab: Lab) -> Data:
    """How often the printed 95 % intervals hold the truth, where items are few and scores near their bounds."""
    reps, rng = lab.size(4000, 20), np.random.default_rng(0)
    return {
        "repetitions": reps,
        "one": [_coverage(kind, g, reps, rng) for kind in KINDS for g in CLUSTERS],
        "five": [_coverage(kind, g, reps // 5, rng, tasks=5) for kind in list(KINDS)[:3] for g in CLUSTERS],
        "changes": [_coverage_of_change(g, loss, reps, rng) for g in CLUSTERS for loss in (0.02, 0.1, 0.5, 0.9)],
    }


def _coverage(kind: str, g: int, reps: int, rng: np.random.Generator, tasks: int = 1) -> Data:
    """Coverage and mean width at each true score, of one task or the mean of several equal ones."""
    from holdfast.measure import stats

    hits, widths = [], []
    for p in TRUTHS:
        drawn = [stats.average([_scores(KINDS[kind](p, g, rng)) for _ in range(tasks)]) for _ in range(reps)]
        assert all(0 <= e.low <= e.value <= e.high <= 1 for e in drawn)
        hits.append(float(np.mean([e.low <= p <= e.high for e in drawn])))
        widths.append(float(np.mean([e.high - e.low for e in drawn])))
    return {"kind": kind, "clusters": g, "tasks": tasks, "covered": hits, "width": widths}


def _scores(drawn: np.ndarray) -> Any:
    """Scores and clusters as `stats` takes them."""
    g, m = drawn.shape
    return drawn.ravel(), np.repeat(np.arange(g), m) if m > 1 else None


def _coverage_of_change(n: int, loss: float, reps: int, rng: np.random.Generator) -> Data:
    """Coverage of a paired difference of 0/1 scores where `loss` of the right answers get lost and none are won."""
    from holdfast.measure import stats

    hits = 0
    for _ in range(reps):
        e = stats.change(np.ones(n), (rng.random(n) >= loss).astype(float))
        assert -1 <= e.low <= e.value <= e.high <= 1
        hits += e.low <= -loss <= e.high or e.value == 0  # no change seen has no interval to be wrong
    return {"items": n, "loss": loss, "covered": hits / reps}


# ---------------------------------------------------------------- 5 noise, 6 damage


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
    """(data, method) -> runs of benchmarks/results.py, one per seed."""
    out: dict[tuple[str, str], list[Data]] = {}
    for path in sorted(folder.glob("*.*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "held_out" in run:
            out.setdefault((run["data"], run["method"]), []).append(run)
    return out


def _tunings(folder: Path) -> list[Data]:
    """The verdict on every real tuning there is, from its recorded answers."""
    runs = runs_in(folder)
    rows = []
    for (data, method), found in runs.items():
        if method != "base" and (data, "base") in runs:
            (base, *_), run = runs[data, "base"], found[0]
            sides = [_as_measurement("in-context", r["held_out"], base["chance"]) for r in (base, run)]
            rows.append({"data": data, "method": method, **judged(*sides)})
    return sorted(rows, key=lambda r: (r["data"], -(r["kept"] or {"value": 0})["value"]))


# ---------------------------------------------------------------- 7 seeds


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
        if method in HARMLESS and len(found) > 1 and (data, "base") in runs:
            bare = runs[data, "base"][0]
            base, *seeds = (_as_measurement("in-context", r["held_out"], bare["chance"]) for r in (bare, *found))
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


# ---------------------------------------------------------------- 8 speed

BATCHES = (1, 4, 8, 16, 32)
CHILD = """
import json, sys, time
start = time.perf_counter()
import peft, torch, transformers
from holdfast.verbs.check import check
benchmarks, base, tuned, settings = sys.argv[1:]
sys.path.insert(0, benchmarks)
from _common import peak_bytes
empty = peak_bytes()
report = check(base, tuned, **json.loads(settings))
took, status = time.perf_counter() - start, report["verdict"]["status"]
print(json.dumps({"seconds": took, "empty_bytes": empty, "peak_bytes": peak_bytes(), "status": status}))
"""


def speed(lab: Lab) -> Data:
    """The same items by our scorer and by the harness's HF backend at its best batch size; then whole checks."""
    from lm_eval.models.huggingface import HFLM

    import scoring
    from holdfast.measure.scorer import Scorer

    model, tokenizer = lab.load()
    requests, few = (_instances(tokenizer, n, lab.size(8, 1)) for n in (lab.size(48, 2), lab.size(6, 1)))
    tries = {}
    for size in lab.size(BATCHES, (1, 4)):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        tries[size] = _timed(lambda lm=lm: lm.loglikelihood(few, disable_tqdm=True))[0]
    best = min(tries, key=lambda n: tries[n])
    hflm, scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=best), Scorer(model, tokenizer)
    own, other, floors = [], [], []
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    ours, theirs = [], []
    for _ in range(lab.size(3, 1)):  # in turn, since a machine's speed moves
        before = scoring.matmul_rate(model, seconds=lab.size(1.0, 0.05))
        took, ours = _timed(lambda: scorer.score([r.args for r in requests]))
        rate = (before + scoring.matmul_rate(model, seconds=lab.size(1.0, 0.05))) / 2
        own.append(took)
        floors.append({"flops": rate, "times": took * rate / (2 * parameters * scorer.num_unique_tokens)})
        took, theirs = _timed(lambda: hflm.loglikelihood(requests, disable_tqdm=True))
        other.append(took)
    floor = sorted(floors, key=lambda f: f["times"])[len(floors) // 2]
    out = {
        "items": len(requests),
        "dtype": str(model.dtype),
        "seconds": statistics.median(own),
        "harness_seconds": statistics.median(other),
        "each": {"seconds": own, "harness_seconds": other, "floors": floors},
        "harness_batch_size": best,
        "harness_tries": tries,
        "harness_tries_items": len(few),
        "times_faster": statistics.median(other) / statistics.median(own),
        "equal": sum(a.greedy == b for a, (_, b) in zip(ours, theirs, strict=True)),
        "unique_tokens": scorer.num_unique_tokens,
        "all_tokens": sum(len(scorer.encode(r.args)[0]) - 1 for r in requests),
        "parameters": parameters,
        "matmul_flops": floor["flops"],
        "times_the_floor": floor["times"],
    }
    return out | {"check": _checks(lab, model, tokenizer)}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def _instances(tokenizer: Any, limit: int, shots: int) -> list[Any]:
    """The in-context suite as the harness's own requests, made by its task classes from our export."""
    from lm_eval.tasks import TaskManager

    from holdfast.measure.export import export_suite

    suite = suite_of("in-context", tokenizer, limit, shots)
    with tempfile.TemporaryDirectory() as folder, _datasets_in(folder):
        paths = [str(Path(folder) / f"{made.task}.yaml") for made in export_suite(suite, folder)]
        tasks = TaskManager(include_defaults=False).load(paths)["tasks"]
        for task in tasks.values():
            task.build_all_requests(rank=0, world_size=1)
        found = [i for task in tasks.values() for i in task.instances]
    asked = sorted((p.context, p.answers[0]) for p in suite.probes)
    assert sorted(i.args for i in found) == asked, "the export changed a text"
    return found


def _checks(lab: Lab, model: Any, tokenizer: Any) -> Data:
    """`check` of two models nobody has measured before, twice, each in a process of its own."""
    from holdfast import models

    size = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    settings = lab.size({}, {"limit": 2, "num_fewshot": 1, "suites": ["in-context"]})
    with tempfile.TemporaryDirectory() as folder:
        master, now = [p.detach().float() for p in model.parameters()], time.time_ns() % 2**31
        for n, name in enumerate(("base", "tuned")):
            noised(model, master, 1e-3, now + n)  # new weights, so that nothing is in the cache
            models.save_model(model, tokenizer, Path(folder) / name, card=None)
        del master
        words = [sys.executable, "-c", CHILD, str(HERE), f"{folder}/base", f"{folder}/tuned", json.dumps(settings)]
        runs = [subprocess.run(words, capture_output=True, text=True, check=False) for _ in range(2)]
    bad = next((r for r in runs if r.returncode), None)
    if bad:
        raise RuntimeError(f"check failed: {bad.stderr[-2000:]}")
    first, second = (json.loads(r.stdout.splitlines()[-1]) for r in runs)
    own = first["peak_bytes"] - first["empty_bytes"]
    return {"first": first, "second": second, "model_bytes": size, "times_the_model": own / size}


# ---------------------------------------------------------------- the page


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(map(str, r))} |" for r in rows)]


def _small(x: float | None) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.1e}"


def _pct(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f} %"


def _kept(r: Data) -> str:
    k = r["kept"]
    return f"{k['value']:.2f} ({k['low']:.2f} to {k['high']:.2f})" if k else "-"


def page_zero(d: Data) -> list[str]:
    rows = [(s["suite"], s["items"], s["changed"], _small(s["largest"]), s["status"]) for s in d["suites"]]
    return _table(("suite", "items", "items that differ", "largest difference", "verdict"), rows)


def page_harness(d: Data) -> list[str]:
    rows = [
        (kind, r["items"], r["equal"], r.get("own_equal", "-") if r["right"] or "own_equal" in r else "-",
         r["right"], _small(r["largest"]))
        for kind, r in d["kinds"].items()
    ]  # fmt: skip
    head = ("kind", "items", "decided alike", "own score alike", "right", "largest log-likelihood difference (nats)")
    note = "Own score: `holdfast measure` without the bridge. Rolling perplexities and texts have no mark to be alike."
    return [*_table(head, rows), "", note]


def page_invariance(d: Data) -> list[str]:
    out = []
    for dtype, found in d.items():
        rows = [(way, r["decisions"], r["differ"], _small(r["largest"])) for way, r in found["ways"].items()]
        head = ("scored otherwise", "decisions", "that differ", "largest log-likelihood difference (nats)")
        out += [
            f"In {dtype}, against the usual way (prefix tree, 2,048 tokens a forward):",
            "",
            *_table(head, rows),
            "",
        ]
    note = (
        "Left against right padding does not apply: the tokens stand in one row, and padding exists only behind the "
        "blocks of attention, where nothing sees it. Base and tuned are scored in one and the same way, so what "
        "rounding moves in bfloat16 moves both: see zero above, and noise below for what it does to a verdict."
    )
    return [*out, note]


def page_simulated(d: Data) -> list[str]:
    one = [
        (_pct(r["changed"]), _pct(r["any_lost"]), _pct(r["kept"]), _pct(j["any_lost"]), _pct(e["kept"]))
        for r, j, e in zip(d["alone"], d["joint"], d["edge"], strict=True)
    ]
    head = ("items that change", "false 'lost'", "'kept'", "false 'lost' of any of 7", "false 'kept' at a 5 % loss")
    tasks, items = d["shapes"][0]
    out = [
        f"{d['repetitions']} repetitions of {tasks} tasks x {items} items with base accuracies like SmolLM2's; "
        "nothing is truly lost, but items change in both directions. The seven abilities have the sizes of the "
        f"default suites ({d['joint_repetitions']} repetitions, their loss test by the bootstrap). Last column: "
        "exactly 5 % of the ability is lost, so 'kept' would be wrong. All but 'kept' should be at most 5 %.",
        "",
        *_table(head, one),
        "",
        f"Power, {d['curve_repetitions']} repetitions a cell: chance that a true loss (points, mean over tasks; in "
        "brackets the share of the ability) is called 'lost', and that it is not called 'kept'.",
        "",
    ]
    limits = sorted({c["limit"] for c in d["curve"]})
    for share in sorted({c["discordance"] for c in d["curve"]}):
        line = [c for c in d["curve"] if c["discordance"] == share]
        rows = [_power_row([c for c in line if c["asked_loss"] == x]) for x in sorted({c["asked_loss"] for c in line})]
        head = ("true loss", *(f"limit {n}: lost / not kept" for n in limits))
        out += [f"{share:.0%} of the items change:", "", *_table(head, rows), ""]
    verdicts, same = (sum(x[k] for x in d["direct"]) for k in ("verdicts", "same"))
    alarms = ", ".join(f"{x['alarms']} of {x['without_loss']} at {x['discordance']:.0%}" for x in d["direct"])
    out.append(
        f"The other verdicts take the bootstrap's distribution as normal; of {verdicts} verdicts by "
        f"`compare.abilities` itself (4000 draws, seven abilities jointly) {same} are the same, and these "
        f"repetitions without a loss gave an alarm there: {alarms}."
    )
    seen = [(s["limit"], _pct(s["promised"]), _pct(s["simulated"])) for s in d["sight"]]
    head = ("limit", "loss that `measure.sight` promises to find", "loss found in nine of ten simulations")
    return [*out, "", *_table(head, seen)]


def _power_row(cells: Sequence[Data]) -> list[str]:
    first = f"{100 * cells[-1]['loss']:.1f} ({_pct(cells[-1]['share'])})"
    return [first, *(f"{c['any_lost']:.2f} / {1 - c['kept']:.2f}" for c in cells)]


def page_intervals(d: Data) -> list[str]:
    head = ("scores", "clusters", *(f"true score {p}" for p in TRUTHS))

    def rows(parts: Sequence[Data]) -> list[list[Any]]:
        return [
            [
                r["kind"],
                r["clusters"],
                *(f"{_pct(h)} ({w:.2f})" for h, w in zip(r["covered"], r["width"], strict=True)),
            ]
            for r in parts
        ]

    sizes = sorted({r["items"] for r in d["changes"]})
    losses = sorted({r["loss"] for r in d["changes"]})
    found = {(r["items"], r["loss"]): _pct(r["covered"]) for r in d["changes"]}
    return [
        f"How often the 95 % interval of a score holds the true score, in {d['repetitions']} repetitions; in brackets "
        "its mean width. All of them lie between 0 and 1 and hold the estimate. The last kind shows the limit of any "
        "interval from few items: where hardly any item carries the difference, a few that look alike say little, and "
        "the interval does not know it.",
        "",
        *_table(head, rows(d["one"])),
        "",
        f"The mean of five such tasks ({d['repetitions'] // 5} repetitions):",
        "",
        *_table(head, rows(d["five"])),
        "",
        "A change of 0/1 scores, of right answers of which a share gets lost; [0, 0] where none did counts as right:",
        "",
        *_table(("items", *(f"true loss {x}" for x in losses)), [[n, *(found[n, x] for x in losses)] for n in sizes]),
    ]


def page_noise(d: Data) -> list[str]:
    rows = d["repetitions"]
    count = {s: sum(r["status"] == s for r in rows) for s in ("kept", "unclear", "lost")}
    flipped, changed = (statistics.mean(r[k] for r in rows) for k in ("flipped", "changed_weights"))
    return [
        f"{len(rows)} repetitions on {d['items']} items ({d['dtype'].removeprefix('torch.')}), noise of "
        f"{d['strength']} of each tensor's root mean square; it changes {_pct(changed)} of the stored weights and "
        f"{_pct(flipped)} of the marks: lost {count['lost']}, unclear {count['unclear']}, kept {count['kept']}."
    ]


def page_damage(d: Data) -> list[str]:
    rows = [(r["damage"], r["strength"], _kept(r), r["status"]) for r in d["rows"]]
    out = _table(("damage", "strength", "in-context learning kept", "verdict"), rows)
    out += [
        "",
        "Noise: in root mean squares of each tensor. Scaled: the middle third of the layers.",
    ]
    if d["tunings"]:
        real = [(r["data"], r["method"], _kept(r), r["status"]) for r in d["tunings"]]
        out += ["", "Real tunings (first seed):", "", *_table(("data", "training", "kept", "verdict"), real)]
    return out


def page_seeds(d: Data) -> list[str]:
    def span(e: Data) -> str:
        ends = ["none" if x is None else f"{100 * x:.1f}" for x in (e["low"], e["high"])]
        return f"{100 * e['value']:.1f} ({ends[0]} to {ends[1]})"

    rows = [
        (r["recipe"], r["items"], "; ".join(map(span, r["runs"])), span(r["over_seeds"]), span(r["hierarchical"]))
        for r in d["rows"]
    ]
    head = ("recipe", "items", "each run, interval over items", "mean, t interval over seeds", "over seeds and items")
    note = "Change of held-out in-context accuracy, points. An interval over items says nothing about the next seed."
    out = [*_table(head, rows), "", note]
    if twins := d.get("twins"):
        out += ["", "Two seeds of one tuning against each other, each way round:", ""]
        groups = (("no seed has lost against the base", False), ("a seed has itself lost against the base", True))
        rows = []
        for words, harmed in groups:
            some = [t for t in twins if t["harmed"] == harmed]
            count = [sum(t["status"] == s for t in some) for s in ("lost", "unclear", "kept")]
            names = sorted({f"{t['data']}, {t['method']}" for t in some})
            rows.append((f"{words}: {'; '.join(names)}", len(some), *count))
        out += _table(("tunings", "verdicts", "lost", "unclear", "kept"), rows)
    return out


def page_speed(d: Data) -> list[str]:
    check = d["check"]
    tries = ", ".join(f"{n}: {s:.1f} s" for n, s in d["harness_tries"].items())
    return [
        f"In-context suite, {d['items']} items, {d['dtype'].removeprefix('torch.')}: {d['seconds']:.1f} s; "
        f"lm-evaluation-harness's HF backend, same items and process, in turn, batch size "
        f"{d['harness_batch_size']}: {d['harness_seconds']:.1f} s, {d['times_faster']:.1f} times as long (medians of "
        f"{len(d['each']['seconds'])}). {d['equal']} of {d['items']} decisions are equal. Batch sizes tried on "
        f"{d['harness_tries_items']} items: {tries}.",
        "",
        f"{d['unique_tokens']} of {d['all_tokens']} tokens are unique. Floor: 2 x {d['parameters'] / 1e6:.0f} M "
        f"parameters x unique tokens at {d['matmul_flops'] / 1e9:.0f} GFLOP/s, measured in the same process: "
        f"{d['times_the_floor']:.2f} times the floor.",
        "",
        f"`check` of two new models with the default suites: {check['first']['seconds']:.0f} s, the second time "
        f"{check['second']['seconds']:.0f} s; peak memory {check['first']['peak_bytes'] / 1e6:.0f} MB, of which "
        f"{check['first']['empty_bytes'] / 1e6:.0f} MB are the imported libraries; the rest is "
        f"{check['times_the_model']:.1f} times the weights.",
    ]


SECTIONS: dict[str, tuple[Callable[[Lab], Data], str, Callable[[Data], list[str]]]] = {
    "zero": (zero, "A model against itself: zero", page_zero),
    "harness": (harness, "The same scores as lm-evaluation-harness", page_harness),
    "invariance": (invariance, "What must not matter", page_invariance),
    "simulated": (simulated, "False alarms and power, simulated", page_simulated),
    "intervals": (intervals, "Intervals of few items", page_intervals),
    "noise": (noise, "False alarms on the real model", page_noise),
    "damage": (damage, "Planted damage", page_damage),
    "seeds": (seeds, "Seeds", page_seeds),
    "speed": (speed, "Speed and memory", page_speed),
}
INTRO = """# Is the ruler straight?

Checks of the measuring itself, on SmolLM2-135M-Instruct. Produced by `benchmarks/ruler.py`; do not edit by hand.
"""


def run(lab: Lab, out: Path, only: str | None = None) -> None:
    """Measure the sections that have no JSON yet."""
    import torch

    from holdfast.files import write_json
    from holdfast.versions import versions

    out.mkdir(parents=True, exist_ok=True)
    for name in [only] if only else SECTIONS:
        path = out / f"{name}.json"
        if path.exists():
            print(f"{name}: there already ({path})", flush=True)
            continue
        seconds, data = _timed(lambda name=name: SECTIONS[name][0](lab))
        where = {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
        where |= {"threads": torch.get_num_threads(), "accelerator": torch.cuda.is_available()}
        head = {"section": name, "model": lab.model, "smoke": lab.smoke, "seconds": seconds}
        write_json(path, {**head, "hardware": where, "versions": versions(), "data": data})
        print(f"{name}: {seconds:.0f} s", flush=True)


def page(out: Path) -> str:
    """docs/ruler.md: measured lines only."""
    text = [INTRO]
    for name, (_, title, lines) in SECTIONS.items():
        path = out / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"smoke": True}
        text += [f"## {title}", ""]
        if found["smoke"]:
            text += ["Not measured yet.", ""]
            continue
        h, v = found["hardware"], found["versions"]
        where = f"{h['system']} {h['machine']}, {h['threads']} of {h['cores']} cores, torch {v['torch']}"
        lib = f"transformers {v['transformers']}" + (
            f", lm_eval {v['lm_eval']}" if name in ("harness", "speed") else ""
        )
        text += [*lines(found["data"]), "", f"Measured in {found['seconds']:.0f} s: {where}, {lib}.", ""]
    return "\n".join(text)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--only", choices=tuple(SECTIONS))
    parser.add_argument("--model", default=Lab.model, help="an alias, hub id or folder")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the JSON files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs of results.py")
    args = parser.parse_args(words)
    if args.smoke and (args.out is None or args.out.resolve() == OUT.resolve()):
        parser.error("--smoke needs its own --out folder: its numbers mean nothing")
    if args.what == "page":
        from holdfast.files import write_text

        write_text(PAGE, page(args.out or OUT))
        return
    run(Lab(args.model, args.smoke, args.results), args.out or OUT, args.only)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
