"""Our suites as tasks of lm-evaluation-harness: one YAML file and one data file a task, runnable without us.

    lm_eval --model hf --model_args pretrained=... --include_path <folder> --tasks holdfast_<suite>

The harness then asks the same text and, apart from the last bits, gives the same scores: contexts and answers stand
in the data as they are, an answer carries its own leading blank, and the target_delimiter is empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import HoldfastError
from holdfast.measure.probe import Group, Probe, Suite, counts_end


@dataclass(frozen=True)
class Exported:
    """What became of one group: the harness's name of it ("" if it was left out), and what the user should know."""

    group: str
    task: str = ""
    warning: str = ""


def export_suite(suite: Suite, folder: str | Path) -> list[Exported]:
    """Write every group of a suite that the harness can run into `folder`; returns one entry for each group.

    exact       -> loglikelihood, acc (the greedy flag); so is begins
    choice      -> multiple_choice; acc, or acc_norm or acc_bytes where log-likelihoods are divided by lengths
    calibrated  -> multiple_choice, acc and brier_score (our score is 1 - Brier / 2)
    likelihood  -> loglikelihood_rolling, perplexities; after a context: loglikelihood, perplexity of the whole answer
    generate    -> left out: its judge is code

    Rolling scores of the harness also count the first token that some tokenizers add themselves.
    The YAML files name the data by absolute path, since the harness resolves it from where it is started.

    Raises:
        HoldfastError: two groups would have one file.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = [_slug(g.name) for g in suite.groups]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise HoldfastError(f"Two tasks of {suite.name!r} would both be written to {twice!r}.", "Rename one of them.")
    probes = {g.name: [p for p in suite.probes if p.task == g.name] for g in suite.groups}
    return [_export(suite.name, g, probes[g.name], folder) for g in suite.groups]


def _export(suite: str, group: Group, probes: Sequence[Probe], folder: Path) -> Exported:
    kinds = {p.kind for p in probes}
    if len(kinds) != 1:
        return Exported(group.name, warning=f"{group.name}: left out, it has {len(kinds)} kinds of questions.")
    if kinds == {"generate"}:
        return Exported(group.name, warning=f"{group.name}: left out, its answers are judged by code.")
    task = _slug(f"holdfast_{suite}_{group.name}")
    asked, warning = _asked(probes)
    data = folder / f"{task}.jsonl"
    lines = [json.dumps({"id": p.id, "cluster": p.cluster, **_columns(p)}, ensure_ascii=False) for p in probes]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "task": task,
        "tag": _slug(f"holdfast_{suite}"),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data.as_posix()}},
        "test_split": "test",
        **asked,
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": group.version},
    }
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    return Exported(group.name, task, f"{group.name}: {warning}" if warning else "")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _columns(p: Probe) -> dict[str, Any]:
    if p.kind in ("choice", "calibrated"):
        return {"context": p.context, "choices": list(p.answers), "answer": p.right}
    return {"context": p.context, "answer": p.answer}


def _asked(probes: Sequence[Probe]) -> tuple[dict[str, Any], str]:
    """The part of the YAML that depends on the kind, and a warning where the score is not quite ours."""
    kind = probes[0].kind
    if kind in ("exact", "begins"):
        return _config("loglikelihood", "acc"), _end_warning(probes)
    if kind == "likelihood" and any(p.context for p in probes):
        warning = "the harness gives the perplexity of whole answers, not of their tokens."
        return _config("loglikelihood", "perplexity"), warning
    if kind == "likelihood":
        bare = {"doc_to_text": ""}
        return _config("loglikelihood_rolling", "bits_per_byte", "byte_perplexity", "word_perplexity") | bare, ""
    picks = {"doc_to_choice": "choices"}
    if kind == "calibrated":
        alike = len({len(p.answers) for p in probes}) == 1  # the harness stacks the probabilities
        config = _config("multiple_choice", "acc", *(["brier_score"] if alike else [])) | picks
        only = "" if alike else "only acc: the harness has no Brier score for choices of several numbers."
        return config, only or _end_warning(probes)
    metric, warning = _normalised(probes)
    return _config("multiple_choice", metric) | picks, warning or _end_warning(probes)


def _end_warning(probes: Sequence[Probe]) -> str:
    """The harness asks whether an answer begins the greedy text, not whether it then ends."""
    bare = any(counts_end(p) and not a.endswith("\n") for p in probes for a in p.answers)
    return (
        "the harness does not see whether an answer ends: it takes 1 for right where a model says 10." if bare else ""
    )


def _normalised(probes: Sequence[Probe]) -> tuple[str, str]:
    lengths = {
        "acc": lambda p: None,
        "acc_norm": lambda p: tuple(map(len, p.answers)),
        "acc_bytes": lambda p: tuple(len(a.encode()) for a in p.answers),
    }
    for metric, of in lengths.items():
        if all(p.answer_lengths == of(p) for p in probes):
            return metric, ""
    return "acc", "log-likelihoods are divided by lengths the harness does not know; it sums them."


def _config(output_type: str, *metrics: str) -> dict[str, Any]:
    aggregation = {"acc": "mean", "acc_norm": "mean", "acc_bytes": "mean", "byte_perplexity": "weighted_perplexity"}
    aggregation |= {"word_perplexity": "weighted_perplexity"}
    listed = [
        {
            "metric": m,
            "aggregation": aggregation.get(m, m),
            "higher_is_better": m.startswith("acc"),
        }
        for m in metrics
    ]
    return {
        "output_type": output_type,
        "doc_to_text": "context",
        "doc_to_target": "answer",
        "metric_list": listed,
    }
