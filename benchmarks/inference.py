"""What `holdfast.decode` and the diagnoses by name say of a plain tuning on the real model: one look, a few minutes.

    python benchmarks/inference.py --shared ../shared/data      # writes benchmarks/results/inference.json
    python benchmarks/inference.py table                        # writes the tables of docs/repair.md and docs/check.md

The tuning is sst2.lora.0 of `repair.py`. `task`: the right label is the likelier one, on test rows. `in-context`: the
whole answer is the greedy one, on items of the built-in suite at 8 shots. Ways that only mix logits (emulated tuning,
contrast) read both models' logits once. There is no second size of the family here, so the large model of emulated
tuning is the untouched base itself: what comes out is the way from the base to the tuned model in logits.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import repair
import repair_table
from leaderboard_plans import HERE, OUT, TASKS

Data = dict[str, Any]
Rule = Callable[[Any, Any], Any]  # (base's logits, tuned model's) -> the outcome's, all (N, V)
SCALES, BETAS, ALPHAS = (0.5, 0.75, 0.9, 1.1, 1.25), (4.0, 2.0, 1.0, 0.5), (0.1, 0.5)
SHOTS, TARGET = 8, OUT / "inference.json"
NOTHING = ["Not measured on a real model yet."]
CONTROL = "sst2.lora.0.own"  # a repair of the same tuning, where it was run


@dataclass(frozen=True)
class Lab:
    """What is asked. rows: (prompt, label) of the task; labels; asked: token rows and the place of the right label."""

    tokenizer: Any
    labels: Sequence[int]
    right: Sequence[int]
    task: Sequence[Any]
    few: Sequence[Any]

    @classmethod
    def of(cls, tokenizer: Any, rows: Sequence[Any], limit: int) -> Lab:
        from holdfast.data.encoder import Encoder
        from holdfast.engine.pack import token_row
        from holdfast.measure.probe import Ask
        from holdfast.measure.suites import build

        encoder, words = Encoder(tokenizer), sorted({r.completion for r in rows})
        splits = encoder.join([(r.prompt, r.completion) for r in rows], end=False)
        firsts = {w: next(s.answer[0] for s, r in zip(splits, rows, strict=True) if r.completion == w) for w in words}
        assert len(set(firsts.values())) == len(words), "labels begin with the same token"
        task = [token_row(s.ids[: s.start + 1], s.start) for s in splits]
        probes = build("in-context", Ask(tokenizer, SHOTS, limit)).probes
        asked = encoder.join([(p.context, p.answers[0]) for p in probes], end=False)
        right = [words.index(r.completion) for r in rows]
        return cls(tokenizer, [firsts[w] for w in words], right, task, [token_row(s.ids, s.start) for s in asked])

    def logits(self, model: Any) -> tuple[Any, Any]:
        """Those of the labels' place (N, V), and of all tokens of the few-shot answers (M, V)."""
        import torch

        from holdfast.engine.base import batches
        from holdfast.engine.forward import forward

        def read(rows: Sequence[Any]) -> Any:
            with torch.no_grad():
                return torch.cat([forward(model, some)[1].float() for _, some in batches(rows, 1024)])

        return read(self.task), read(self.few)

    def score(self, task: Any, few: Any) -> Data:
        """Shares right of (N, V) and (M, V) logits."""
        likelier = task[:, list(self.labels)].argmax(-1).tolist()
        chosen, at, whole = few.argmax(-1).tolist(), 0, []
        for row in self.few:
            target = row.ids[row.scored].tolist()
            whole.append(chosen[at : at + len(target)] == target)
            at += len(target)
        right = fmean(a == b for a, b in zip(likelier, self.right, strict=True))
        return {"task": round(right, 4), "in-context": round(fmean(whole), 4)}


def mixed(lab: Lab, base: Any, tuned: Any) -> Data:
    """Emulated tuning and contrast, from the logits of both models."""
    from holdfast.decode.contrast import contrasted
    from holdfast.decode.emulated import emulated

    before, after = lab.logits(base), lab.logits(tuned)
    rules: dict[str, Rule] = {f"emulated, beta {b:g}": partial(_emulated, emulated, 1 / b) for b in BETAS}
    rules |= {f"contrast, alpha {a:g}": partial(_contrasted, contrasted, a) for a in ALPHAS}
    found = {"base": lab.score(*before), "tuned model": lab.score(*after)}
    return found | {n: lab.score(*map(rule, before, after)) for n, rule in rules.items()}


def _emulated(rule: Any, strength: float, base: Any, tuned: Any) -> Any:
    return rule(base, [tuned], base, strength)


def _contrasted(rule: Any, alpha: float, base: Any, tuned: Any) -> Any:
    return rule(tuned, base, alpha)


def scaled(lab: Lab, base: Any, tuned: Any) -> Data:
    """Scaled tuning; uses up both models."""
    from holdfast.decode import scale_tuning, set_scale

    model = scale_tuning(tuned, base)
    found = {}
    for scale in SCALES:
        set_scale(model, scale)
        found[f"scaled, a {scale:g}"] = lab.score(*lab.logits(model))
    return found


def drafted(lab: Lab, base: Any, tuned: Any, train: Sequence[Any], rows: Sequence[Any]) -> Data:
    """SCALE: the untouched base with 8 demonstrations, with the tuned model's drafts in the prompt and without."""
    from holdfast.decode import copy_rate, drafts_of, specialist_hint
    from holdfast.measure.scorer import Scorer

    template = TASKS["sst2"]["prompt"].replace("{sentence}", "{x}")

    def pair(r: Any) -> tuple[str, str]:
        return r.prompt.removesuffix(template.removeprefix("{x}")), r.completion.strip()

    shots, queries = [pair(r) for r in train[:SHOTS]], [pair(r) for r in rows]
    draft, words = drafts_of(tuned, lab.tokenizer, template, max_tokens=4), sorted({y for _, y in queries})
    found: Data = {}
    for name, specialist in (("without drafts", lambda inputs: [()] * len(inputs)), ("drafts", draft)):
        prompts = specialist_hint(specialist, shots, queries)
        asked = [(p.prompt.context, f" {w}") for p in prompts for w in words]
        sums = [s.logprob for s in Scorer(base, lab.tokenizer).score(asked)]
        rows_of = [sums[n : n + len(words)] for n in range(0, len(sums), len(words))]
        picked = [words[own.index(max(own))] for own in rows_of]
        found[f"{SHOTS} shots, {name}"] = round(fmean(a == y for a, (_, y) in zip(picked, queries, strict=True)), 4)
        if name == "drafts":
            good = [p.drafts == (y,) for p, (_, y) in zip(prompts, queries, strict=True)]
            found |= {"copied": round(copy_rate(picked, prompts), 4), "drafts right": round(fmean(good), 4)}
    return found


def causes(base: Any, tuned: Any, tokenizer: Any) -> Data:
    """What each diagnosis by name finds, its numbers and its seconds; that of three models has no third one here."""
    from holdfast.diagnose import MORE, Case, run

    found = {}
    for name in (n for n in MORE if n != "safety subspaces"):
        start = time.process_time()
        (finding,) = run(Case(base, tuned, tokenizer), [name])
        scores = {k: round(float(v), 4) for k, v in finding.scores.items()}
        found[name] = {"finding": finding.finding, "scores": scores, "cpu_seconds": round(time.process_time() - start)}
        print(f"  {name}: {finding.finding}", flush=True)
    return found


def measure(shared: Path, work: Path, rows: int, limit: int) -> Data:
    import _common as C
    from holdfast import models

    folder = str(repair.tuned("sst2", "lora", 0, shared, work))

    def load(name: str) -> Any:
        return models.load(name, merge_adapter=True)[0]

    base, tokenizer = models.load(repair.BASE)
    train, _, test, _ = repair.read("sst2", shared, tokenizer)
    random.Random(0).shuffle(train)
    test = test[:rows]
    tuned, lab = load(folder), Lab.of(tokenizer, test, limit)
    start, cpu = time.perf_counter(), time.process_time()
    found: Data = {"facts": C.facts(), "rows": len(test), "items": len(lab.few)}
    found["ways"] = mixed(lab, base, tuned)
    found["drafts"] = drafted(lab, base, tuned, train, test)
    found["causes"] = {"tuned model": causes(base, tuned, tokenizer)}
    healed = work / "repaired" / CONTROL / "model"
    if healed.exists():
        found["causes"]["healed"] = causes(base, load(str(healed)), tokenizer)
    found["ways"] |= scaled(lab, base, tuned)
    return found | {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


# ---- tables


def ways_table(found: Data) -> list[str]:
    where = (
        f"One LoRA tuning of SST-2 (`benchmarks/inference.py`, SmolLM2-135M-Instruct): {found['rows']} test rows, "
        f"{found['items']} few-shot items. The large model of emulated tuning is the untouched base itself."
    )
    lines = [where, "", "| way | SST-2 accuracy | in-context, share right |", "|---|---|---|"]
    lines += [f"| {n} | {w['task']:.3f} | {w['in-context']:.3f} |" for n, w in found["ways"].items()]
    return lines + [f"| base, SCALE: {n} | {share:.3f} | - |" for n, share in found["drafts"].items()]


def causes_table(found: Data) -> list[str]:
    sides = [*found["causes"]]
    where = (
        "On one LoRA tuning of SST-2 that lost in-context learning (`benchmarks/inference.py`, SmolLM2-135M-Instruct):"
    )
    lines = [where, "", f"| diagnosis | {' | '.join(sides)} | CPU seconds |", "|" + "---|" * (len(sides) + 2)]
    for name, first in found["causes"][sides[0]].items():
        words = [found["causes"][side][name]["finding"].replace("|", "/") for side in sides]
        lines.append(f"| `{name}` | {' | '.join(words)} | {first['cpu_seconds']} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "repair", help="where the models are kept")
    parser.add_argument("--rows", type=int, default=150, help="test rows of the task")
    parser.add_argument("--limit", type=int, default=6, help="items of each in-context task")
    args = parser.parse_args()
    if args.what == "run":
        from holdfast.files import write_json

        args.work.mkdir(parents=True, exist_ok=True)
        write_json(TARGET, measure(args.shared, args.work, args.rows, args.limit))
    found = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else None
    docs = HERE.parent / "docs"
    repair_table.put(docs / "repair.md", "inference.py", {"ways": ways_table(found) if found else NOTHING})
    repair_table.put(docs / "check.md", "inference.py", {"causes": causes_table(found) if found else NOTHING})


if __name__ == "__main__":
    main()
