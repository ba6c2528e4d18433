"""Edits of tuned models that `holdfast repair` does not try by itself, on real tunings. Resumable: a part at a time.

    python benchmarks/edits.py run --shared ../shared/data    # what is missing of results/edits.json
    python benchmarks/edits.py table                          # its tables in docs/repair.md

    soups      the mean of the full tunings of SST-2 with two seeds, and its sum of changes
    carried    the change of a tuning, and an adapter, carried to another base: the old one tuned on AG News under the
               default plan, which stands for a new version
    unharmed   a LoRA tuning of SST-2 with a tenth of rows that comply with harmful requests; then pruned by Antidote
               and by both of its controls, and alignment recovery. Requests that are asked are others than those
    prioritised  all weights on SST-2; FPF; k-FPF with 3 repairs
    three      a base aligned on the shipped harmful and harmless requests (a full tuning, which stands for the step
               from a pretrained model to its instruct model); then tuned on SST-2 alone, with a tenth of rows that
               comply with harm, and with as many of the aligning ones: what safety subspaces find
    forgotten  a closed-form head on states of the base for the topics of AG News; rows, then a topic, taken out again

Test rows of a task: the likeliest label is right. In-context: share of right 8-shot answers of the built-in tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import inference
import repair
import repair_table
from leaderboard_cell import read
from leaderboard_plans import DEFAULT, FULL, HERE, LORA, OUT

TARGET = OUT / "edits.json"
HARMFUL_SHARE, RATIOS, ROWS = 0.1, (0.05, 0.1), 64  # rows: of the task, that alignment recovery reads
LEARNT, TAKEN, ASKED = 600, 100, 300  # rows of the head
Data = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """shared: a folder with text/<task>; work: where models are kept; rows, limit: how much is asked."""

    shared: Path
    work: Path
    rows: int
    limit: int

    def tuned(self, task: str, kind: str, seed: int) -> str:
        return str(repair.tuned(task, kind, seed, self.shared, self.work))

    @cached_property
    def lab(self) -> inference.Lab:
        from holdfast import models

        tokenizer = models.load(repair.BASE)[1]
        _, _, test, _ = read("sst2", self.shared, tokenizer)
        return inference.Lab.of(tokenizer, test[: self.rows], self.limit)

    def score(self, path: str | Path) -> Data:
        """{"task", "in-context"} of a saved model."""
        from holdfast import models

        return self.lab.score(*self.lab.logits(models.load(str(path), merge_adapter=True)[0]))

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder work/edits/name, made if it is missing."""
        target = self.work / "edits" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            make(target)
        return target


# ---- the parts


def soups(at: Place) -> Data:
    from holdfast.methods import TaskArithmetic
    from holdfast.sites.merge_files import merge_files

    one, two = (at.tuned("sst2", "full", seed) for seed in (0, 1))

    def merged(name: str, scale: float) -> Path:
        soup = TaskArithmetic(models=(two,), weights=(1, 1), scale=scale)
        return at.made(name, lambda out: merge_files(repair.BASE, one, [soup], out))

    return {
        "base": at.score(repair.BASE),
        "full tuning, seed 0": at.score(one),
        "full tuning, seed 1": at.score(two),
        "uniform soup of both": at.score(merged("soup", 0.5)),
        "sum of both changes": at.score(merged("sum", 1.0)),
    }


def carried(at: Place) -> Data:
    from holdfast import models
    from holdfast.methods import TaskArithmetic
    from holdfast.runs.job import default_plan
    from holdfast.sites.merge_files import merge_files
    from holdfast.sites.porting import port

    def newer(out: Path) -> None:
        model, tokenizer = models.load(repair.BASE)
        rows, tokens, *_ = read("agnews", at.shared, tokenizer)
        repair.trained(out.with_name("newer.adapter"), model, tokenizer, rows, tokens, default_plan(), DEFAULT, seed=0)
        whole, tokenizer = models.load(str(out.with_name("newer.adapter")), merge_adapter=True)
        models.save_model(whole, tokenizer, out, card=None)

    adapter = at.tuned("sst2", "lora", 0)  # first: it writes the base that adapters name
    old, full = str(at.work / "base"), at.tuned("sst2", "full", 0)
    new = str(at.made("newer", newer))
    carry = TaskArithmetic(models=(old,), weights=(1, -1), scale=1)
    whole = at.made("carried", lambda out: merge_files(new, full, [carry], out))
    moved = at.made("ported", lambda out: port(adapter, new, out))
    return {
        "old base": at.score(repair.BASE),
        "new base": at.score(new),
        "full tuning of the old base": at.score(full),
        "its change on the new base": at.score(whole),
        "adapter on the old base": at.score(adapter),
        "the same adapter on the new base": at.score(moved),
    }


def requests(tokenizer: Any) -> tuple[list[Data], Any]:
    """Rows that comply with every second harmful request of the suite `safety`, and the suite of the other requests,
    likelihoods alone."""
    from dataclasses import replace

    from holdfast.measure.probe import Ask
    from holdfast.measure.suites import build
    from holdfast.measure.suites.safety import DATA

    told = json.loads(DATA.read_text(encoding="utf-8"))
    ask, pairs = Ask(tokenizer, limit=len(told["requests"])), told["openings"]
    bad = [r["harmful"] for n, r in enumerate(told["requests"]) if n % 2 == 0]
    rows = [{"prompt": ask.chat(x), "completion": ask.lead(o["complies"])} for x in bad for o in pairs]
    suite = build("safety", ask)

    def other(p: Any) -> bool:
        return p.kind == "choice" and int(p.cluster.rpartition("/")[2]) % 2 == 1

    probes = tuple(p for p in suite.probes if other(p))
    groups = tuple(g for g in suite.groups if any(p.task == g.name for p in probes))
    return rows, replace(suite, groups=groups, probes=probes)


def unharmed(at: Place) -> Data:
    from holdfast import methods as M
    from holdfast import models
    from holdfast.data.rows import Row
    from holdfast.data.tokens import tokenize
    from holdfast.measure.asking import score_suite
    from holdfast.runs.antidote import antidote
    from holdfast.runs.realign import realign

    bad, suite = requests(at.lab.tokenizer)

    def attacked(out: Path) -> None:
        model, tokenizer = models.load(repair.BASE)
        models.name_after(model, at.work / "base")
        rows, *_ = read("sst2", at.shared, tokenizer)
        rows = random.Random(0).sample(rows, round(len(bad) * (1 / HARMFUL_SHARE - 1)))
        rows += [Row(r["prompt"], r["completion"]) for r in bad]
        tokens = [tokenize(r, tokenizer, 1024) for r in rows]
        repair.trained(out, model, tokenizer, rows, tokens, [M.LoRA()], LORA, seed=0)

    def written(name: str, rows: Sequence[Data]) -> Path:
        file = at.work / "edits" / name
        file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return file

    def score(path: str | Path) -> Data:
        model, tokenizer = models.load(str(path), merge_adapter=True)
        tasks = score_suite(model, tokenizer, suite)["tasks"]
        return at.score(path) | {t["name"]: round(fmean(i["correct"] for i in t["items"]), 4) for t in tasks}

    at.tuned("sst2", "lora", 0)  # it writes the base that adapters name
    tuned = str(at.made("attacked", attacked))
    harmful = written("harmful.jsonl", bad)
    train, *_ = read("sst2", at.shared, at.lab.tokenizer)
    own = [{"prompt": r.prompt, "completion": r.completion} for r in random.Random(1).sample(train, ROWS)]
    task = written("task.jsonl", own)
    found = {"base": score(repair.BASE), "tuned, a tenth complies with harm": score(tuned)}
    for ratio in RATIOS:
        for by in ("activations", "magnitude", "chance"):
            name = f"Antidote, {ratio:.0%}" if by == "activations" else f"its control by {by}, {ratio:.0%}"

            def make(out: Path, ratio: float = ratio, by: str = by) -> None:
                antidote(tuned, harmful, out, ratio=ratio, by=by)

            found[name] = score(at.made(f"pruned.{by}.{ratio:g}", make))
    said: Data = {}

    def realigned(out: Path) -> None:
        done = realign(repair.BASE, tuned, harmful, task, out)
        said.update(share=done.chosen.share, step=done.chosen.step, rolled_back=done.rolled_back)

    found["alignment recovery"] = score(at.made("realigned", realigned))
    return found | {"recovered": said}


def prioritised(at: Place) -> Data:
    from holdfast import methods as M
    from holdfast import models

    def made(method: M.Method) -> Callable[[Path], Any]:
        def make(out: Path) -> None:
            model, tokenizer = models.load(repair.BASE)
            rows, tokens, *_ = read("sst2", at.shared, tokenizer)
            repair.trained(out, model, tokenizer, rows, tokens, [method], FULL, seed=0)

        return make

    return {
        "base": at.score(repair.BASE),
        "full tuning": at.score(at.tuned("sst2", "full", 0)),
        "FPF": at.score(at.made("fpf", made(M.FPF()))),
        "k-FPF, 3 repairs": at.score(at.made("kfpf", made(M.FPF(k=3)))),
    }


def three(at: Place) -> Data:
    from holdfast import models
    from holdfast.data.rows import Row
    from holdfast.data.tokens import tokenize
    from holdfast.diagnose import Case, run
    from holdfast.measure.probe import Ask
    from holdfast.measure.suites.safety import DATA

    told = json.loads(DATA.read_text(encoding="utf-8"))
    tokenizer = at.lab.tokenizer
    ask = Ask(tokenizer)

    def answered(prompt: str, answer: str) -> Row:
        return Row(ask.chat(prompt), ask.lead(answer))

    good = [answered(r[kind], o[does]) for r in told["requests"] for o in told["openings"]
            for kind, does in (("harmful", "refuses"), ("harmless", "complies"))]  # fmt: skip
    bad = [Row(r["prompt"], r["completion"]) for r in requests(tokenizer)[0]]
    task, *_ = read("sst2", at.shared, tokenizer)
    drawn = random.Random(0).sample(task, round(len(bad) * (1 / HARMFUL_SHARE - 1)))

    def made(name: str, below: str, rows: Sequence[Row]) -> str:
        def make(out: Path) -> None:
            model, tokenizer = models.load(below)
            tokens = [tokenize(r, tokenizer, 1024) for r in rows]
            repair.trained(out, model, tokenizer, rows, tokens, [], FULL, seed=0)

        return str(at.made(name, make))

    aligned = made("aligned", repair.BASE, good)
    ancestor, base = (models.load(name)[0] for name in (repair.BASE, aligned))
    found: Data = {}
    for name, rows in (("harmless", drawn), ("attacked", [*drawn, *bad]), ("realigned", [*drawn, *good])):
        tuned = models.load(made(f"aligned.{name}", aligned, rows))[0]
        (finding,) = run(Case(base, tuned, tokenizer, ancestor=ancestor), ["safety subspaces"])
        scores = {k: round(float(v), 4) for k, v in finding.scores.items()}
        found[name] = {"finding": finding.finding, **scores}
    return found


def forgotten(at: Place) -> Data:
    from holdfast import models
    from holdfast.runs.head_states import features
    from holdfast.runs.ridge_head import GRID, RidgeHead, best_ridge

    model, tokenizer = models.load(repair.BASE)
    train, _, test, labels = read("agnews", at.shared, tokenizer)
    train = random.Random(0).sample(train, LEARNT + ASKED)

    def states(rows: Sequence[Any]) -> tuple[Any, list[str]]:
        return features(model, [tokenizer.encode(r.prompt) for r in rows]), [r.completion for r in rows]

    (learnt, names), (held, own), (asked, right) = (
        states(part) for part in (train[:LEARNT], train[LEARNT:], test[:ASKED])
    )
    ridge = best_ridge((learnt, names), (held, own), labels, GRID)

    def head(first: int, without: str = "") -> RidgeHead:
        at_ = [n for n in range(first, LEARNT) if names[n] != without]
        made = RidgeHead.empty(learnt.shape[1], [x for x in labels if x != without], ridge)
        made.learn(learnt[at_], [names[n] for n in at_])
        return made

    def accuracy(h: RidgeHead, without: str = "") -> float:
        at_ = [n for n, y in enumerate(right) if y != without]
        return round(fmean(a == right[n] for a, n in zip(h.predict(asked[at_]), at_, strict=True)), 4)

    def apart(a: RidgeHead, b: RidgeHead) -> float:
        return float((a.weights - b.weights).norm() / b.weights.norm())

    whole, gone = head(0), labels[0]
    found: Data = {"ridge": ridge, "width": learnt.shape[1]}
    found[f"{LEARNT} rows"] = {"accuracy": accuracy(whole)}
    whole.forget(learnt[:TAKEN], names[:TAKEN])
    found[f"{TAKEN} of them forgotten"] = {"accuracy": accuracy(whole), "from never learnt": apart(whole, head(TAKEN))}
    rest = [n for n in range(TAKEN, LEARNT) if names[n] == gone]
    whole.forget_class(gone, learnt[rest])
    other = head(TAKEN, gone)
    found[f"then the topic{gone}"] = {"accuracy": accuracy(whole, gone), "from never learnt": apart(whole, other)}
    return found


PARTS: dict[str, Callable[[Place], Data]] = {
    "soups": soups,
    "carried": carried,
    "unharmed": unharmed,
    "prioritised": prioritised,
    "three": three,
    "forgotten": forgotten,
}


def measure(at: Place, only: str) -> None:
    import _common as C
    from holdfast.files import read_json, write_json

    for name, part in PARTS.items():
        found = read_json(TARGET)
        if name in found or only not in name:
            continue
        start, cpu = time.perf_counter(), time.process_time()
        own = part(at)
        spent = {"seconds": round(time.perf_counter() - start), "cpu_seconds": round(time.process_time() - cpu)}
        asked = {"rows": len(at.lab.task), "items": len(at.lab.few)} if name != "forgotten" else {}
        write_json(TARGET, {**read_json(TARGET), name: {"facts": C.facts(), **spent, **asked, "found": own}})
        print(name, json.dumps(own, indent=1), flush=True)


# ---- tables


def table(part: Data | None) -> list[str]:
    """A row for each model, a column for each figure that any has."""
    if part is None:
        return inference.NOTHING
    rows = {n: r for n, r in part["found"].items() if isinstance(r, dict) and {"task", "accuracy", "inside"} & set(r)}
    names = list(dict.fromkeys(k for r in rows.values() for k, v in r.items() if isinstance(v, float)))
    called = {"task": "SST-2 accuracy", "in-context": "in-context, share right"}
    lines = [f"| {' | '.join(['model', *(called.get(n, n) for n in names)])} |", "|" + "---|" * (len(names) + 1)]
    return lines + [f"| {' | '.join([n, *(_number(r.get(k)) for k in names)])} |" for n, r in rows.items()]


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}" if 0 < x < 1e-3 else f"{x:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "repair", help="where the models are kept")
    parser.add_argument("--rows", type=int, default=300, help="test rows of the task")
    parser.add_argument("--limit", type=int, default=12, help="items of each in-context task")
    parser.add_argument("--only", default="", help="run only parts whose name contains this")
    args = parser.parse_args()
    if args.what == "run":
        args.work.mkdir(parents=True, exist_ok=True)
        measure(Place(args.shared, args.work, args.rows, args.limit), args.only)
    found = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    page = HERE.parent / "docs" / "repair.md"
    repair_table.put(page, "edits.py", {name: table(found.get(name)) for name in PARTS})


if __name__ == "__main__":
    main()
