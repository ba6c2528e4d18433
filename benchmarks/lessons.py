"""Two lessons, settled with numbers: docs/lessons.md. Resumable: a small file a run.

    python benchmarks/lessons.py run --shared ../shared/data --minutes 30    # what is missing; starts no run later
    python benchmarks/lessons.py page                                        # docs/lessons.md and its plot

All runs go through one process: the base, its answers and the suites are made once. A run trains 60 steps on SST-2
as a cell of the leaderboard does, and is asked about the task, about few-shot prompts, and the cheap suites; the KL to
the base is taken on the task's rows and on few-shot prompts.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lessons_page
from leaderboard_cell import Lab, Material, asked, made, material, train_methods
from leaderboard_cells import BASE, Cell, Data, clock_after, in_turn, options, packed
from leaderboard_plans import HERE
from lessons_plans import FEW, FOLDER, PHRASINGS, ROWS, SIZE, TASK, Setting, settings

BATCH_TOKENS = 1024


class Bench:
    """What all runs share. lab: its model, its folder of data and how much is asked."""

    def __init__(self, lab: Lab):
        from holdfast import models

        self.lab = lab
        self.base, self.tokenizer = models.load(lab.model)
        self.rows: dict[str, Material] = {"plain": self._plain(material(TASK, lab, self.tokenizer))}

    @staticmethod
    def _plain(found: Material) -> Material:
        """As many rows as a run draws, so that each comes once; chosen by chance."""
        at = random.Random(0).sample(range(len(found.train)), min(ROWS, len(found.train)))
        return replace(found, train=[found.train[n] for n in at], tokens=[found.tokens[n] for n in at])

    def rows_of(self, kind: str) -> Material:
        """The rows of a kind of setting; the test rows are the same in all."""
        if kind not in self.rows:
            plain = self.rows["plain"]
            few = replace(plain, train=plain.train[:FEW], tokens=plain.tokens[:FEW])
            self.rows[kind] = few if kind == "few" else self._phrased(plain)
        return self.rows[kind]

    def _phrased(self, plain: Material) -> Material:
        from holdfast.data.tokens import tokenize

        first = PHRASINGS[0].partition("{sentence}")[2]
        texts = [r.prompt.removesuffix(first) for r in plain.train]
        forms = [PHRASINGS[n % len(PHRASINGS)] for n in range(len(texts))]
        train = [
            replace(r, prompt=form.format(sentence=text))
            for r, form, text in zip(plain.train, forms, texts, strict=True)
        ]
        return replace(plain, train=train, tokens=[tokenize(r, self.tokenizer, BATCH_TOKENS) for r in train])

    # ---- the KL to the base

    @cached_property
    def compared(self) -> dict[str, list[Any]]:
        """Token rows on which the KL is taken: the task's test rows, and a few-shot prompt of each held-out task."""
        from holdfast.data.tokens import tokenize
        from holdfast.measure.suites.in_context import items_of
        from holdfast.measure.tasks import held_out_tasks
        from holdfast.methods.data._shots import encode_shots

        shots = self.lab.size.shots
        items = [items_of(t, tokenizer=self.tokenizer, num_fewshot=shots, limit=1)[0] for t in held_out_tasks()]
        return {
            "task": [tokenize(r, self.tokenizer, 1024) for r in self.rows["plain"].test[: self.lab.size.divergence]],
            "few-shot": [encode_shots(i.prompt, self.tokenizer, "task", every_token=True) for i in items],
        }

    @cached_property
    def teacher(self) -> Any:
        """The base's answers on these rows."""
        from holdfast.services import Teacher

        teacher = Teacher(self.base)
        teacher.learn(self.base, [r for rows in self.compared.values() for r in rows])
        return teacher

    def divergence(self, model: Any) -> dict[str, float]:
        """Mean KL(base || model) in nats at the scored positions of each kind of row."""
        import torch

        from holdfast.engine.base import batches
        from holdfast.engine.forward import forward
        from holdfast.methods.loss._divergence import forward_kl

        found: dict[str, list[Any]] = {}
        with torch.no_grad():
            for kind, rows in self.compared.items():
                for _, batch in batches(rows, BATCH_TOKENS):
                    mine = forward(model, batch)[1].float().log_softmax(-1)
                    found.setdefault(kind, []).append(forward_kl(self.teacher.logp(self.base, batch), mine))
        return {f"kl {kind}": round(float(torch.cat(values).mean()), 6) for kind, values in found.items()}

    # ---- one run

    def measure(self, model: Any, cell: Cell) -> Data:
        """Figures of a model and the packed scores behind them."""
        from holdfast.measure.tuned_task import score_task

        rows = self.rows["plain"]
        task = [i["correct"] for i in score_task(model, self.tokenizer, rows.test, rows.labels)]
        suites, chance = asked(cell, self.lab, model, self.tokenizer, rows.labels)
        figures = {"task": round(fmean(task), 4), **({} if cell.method == BASE else self.divergence(model))}
        figures |= {name: round(fmean(fmean(s) for s in tasks.values()), 4) for name, tasks in suites.items()}
        return {
            "figures": figures,
            **({"chance": chance} if cell.method == BASE else {}),
            "task_scores": packed(task),
            "suites": {name: {t: packed(s) for t, s in tasks.items()} for name, tasks in suites.items()},
        }

    def run(self, setting: Setting | None, seed: int) -> Data:
        """Train and measure a setting; None: measure the base."""
        start, before = time.perf_counter(), time.process_time()
        cell = Cell(TASK, setting.name if setting else BASE, setting.rate if setting else None, seed)
        facts: Data = {"task": TASK, "method": cell.method, "rate": cell.rate, "seed": seed}
        model, extra, cost = self.base, {}, {}
        if setting:
            facts |= {"plan": setting.words, "steps": self.lab.size.steps, "batch": self.lab.size.batch}
            fresh = copy.deepcopy(self.base)
            rows = self.rows_of(setting.rows)
            trained = train_methods(setting.methods(), cell, self.lab, fresh, self.tokenizer, rows)
            model, extra = trained.model, trained.facts
            cost["train_cpu_seconds"] = round(time.process_time() - before, 3)
        found = self.measure(model, cell)
        cost["cpu_seconds"] = round(time.process_time() - before, 3)
        cost["seconds"] = round(time.perf_counter() - start, 1)
        return {**facts, "figures": found.pop("figures"), "cost": cost, "made": made(), **extra, **found}


# ---- many runs


def path_of(folder: Path, name: str, seed: int) -> Path:
    from holdfast.files import safe_name

    return folder / (f"{BASE}.json" if name == BASE else f"{safe_name(name)}.{seed}.json")


def missing(folder: Path, known: Sequence[Setting], seeds: int) -> Iterator[tuple[Setting | None, int]]:
    """What was not measured yet: the base, then all settings with the first seed, then with the next."""
    if not path_of(folder, BASE, 0).exists():
        yield None, 0
    for seed in range(seeds):
        yield from ((s, seed) for s in known if not path_of(folder, s.name, seed).exists())


def drive(bench: Bench, folder: Path, todo: Sequence[tuple[Setting | None, int]], until: float) -> Mapping[str, str]:
    """Run what is to do until the clock shows `until`; returns what failed and why."""
    named = ((setting, seed, setting.name if setting else BASE) for setting, seed in todo)
    made_by = (
        (f"{name}, seed {seed}", path_of(folder, name, seed), partial(bench.run, setting, seed))
        for setting, seed, name in named
    )
    return in_turn(made_by, until)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, "page", FOLDER, "text/sst2 and icl")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this setting; may be repeated")
    args = parser.parse_args(argv)
    known = settings()
    if args.what == "page":
        lessons_page.write(args.folder, known, args.seeds, args.docs)
        return 0
    until = clock_after(args.minutes)
    if unknown := [n for n in args.only if n not in {s.name for s in known}]:
        raise SystemExit(f"There is no setting {unknown[0]!r} in lessons_plans.py. Known: {[s.name for s in known]}.")
    todo = list(missing(args.folder, [s for s in known if s.name in args.only or not args.only], args.seeds))
    print(f"{len(todo)} runs are missing.", flush=True)
    failed = drive(Bench(Lab(args.shared, args.model, SIZE)), args.folder, todo, until) if todo else {}
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
