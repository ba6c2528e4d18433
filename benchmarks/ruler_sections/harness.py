"""The same scores as lm-evaluation-harness."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruler_sections.lab import Data, Lab, items_of, suite_of

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
    with tempfile.TemporaryDirectory() as folder, datasets_in(folder):
        for n, kind in enumerate(SOURCES):
            rows[kind] = _exported(lab, kind, both, Path(folder) / str(n))
        for kind, write in (("few-shot sampling (num_fewshot 2)", _choice_task), ("greedy generation", _spoken_task)):
            path, shots = write(Path(folder), lab.size(60, 4), lab.size(12, 2))
            got, want = (evaluated(lm, [path], shots)[0] for lm in both)
            rows[kind] = agreement(got, want)
    return {"kinds": rows}


@contextmanager
def datasets_in(folder: str) -> Iterator[None]:
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
