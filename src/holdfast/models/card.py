"""The README.md of a tuned model: what was done, on which papers it rests, and what it kept, with intervals.

Every word that comes from outside (model names, paths, recipe) is escaped, and of local paths only the last
part is shown, because a card is published.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from holdfast.report.schema import metric_words

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
ARXIV_ID = re.compile(r"\d{4}\.\d{4,5}(v\d+)?")
HEAD = ("measured on", "items", "before", "after", "retention", "status")


def model_card(
    report: Mapping[str, Any],
    *,
    adapter: bool = False,
    replaced: bool = False,
    license: str | None = None,
    code: str | None = None,
    base: str | None = None,
) -> str:
    """Write the card of a tuned model as Markdown with YAML front matter that the hub accepts.

    Args:
        report: the run's report: model, task, abilities, plan, data, versions, verdict, and optionally recipe
            (text or mapping). Missing parts leave their section out. An estimate is a mapping of value, low,
            high and n.
        adapter: whether the folder holds a PEFT adapter.
        replaced: whether it holds replaced modules, which Holdfast alone loads.
        license: of the tuned model, if known.
        code: Python that loads what lies beside the card.
        base: path of the model that the run wrote as the adapter's base.
    """
    library = "peft" if adapter else "holdfast" if replaced else "transformers"
    front = _front_matter(report, library, license)
    title = f"# {_text(_public(_get(report, 'model', 'name', default='model')))}, tuned with Holdfast"
    sections = [
        title,
        _verdict(report),
        _use(code, base),
        _measured(report),
        _plan(report),
        _data(report),
        _papers(report),
    ]
    sections += [_versions(report), _recipe(report)]
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def _get(report: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    """A nested value, or `default` where any step is missing or None."""
    value: Any = report
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else value


# --- text that cannot break the page --------------------------------------------------------------


def _text(value: Any) -> str:
    """One line of plain words: white space folded, HTML and Markdown made harmless."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", line)


def _code(text: str, language: str) -> str:
    """A fenced block whose fence is longer than any run of backticks inside it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and ".." not in name and not name.endswith(".gguf")


def _public(name: str) -> str:
    """A hub id as it is; of a path only the last part, which tells nothing about the machine."""
    if _is_hub_id(name):
        return name
    return PurePosixPath(name.replace("\\", "/")).name.replace("..", "") or "model"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _estimate(est: Any) -> str:
    """`value [low, high]`, or a dash where nothing was measured."""
    value, low, high = (_number(_get(est or {}, key)) for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def _number(value: Any) -> float | None:
    """A finite float, or None."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None


# --- the parts of a card --------------------------------------------------------------------------


def _front_matter(report: Mapping[str, Any], library: str, license: str | None) -> str:
    import yaml

    from holdfast.models.source import ALIASES

    name = str(_get(report, "model", "name", default=""))
    base = ALIASES.get(name, (name,))[0]
    front: dict[str, Any] = {"base_model": base} if _is_hub_id(base) else {}
    if license:
        front["license"] = license
    front |= {"library_name": library, "pipeline_tag": "text-generation"}
    front["tags"] = ["holdfast", *(["peft"] if library == "peft" else [])]
    results = [row for row in _results(report) if row["metrics"]]
    if results:
        front["model-index"] = [{"name": f"{_public(name)}-holdfast", "results": results}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _results(report: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows of the hub's model-index: the task and every ability, after tuning."""
    task = _get(report, "task", default={})
    rows = [(task, _get(task, "metric", default="score"))] if task else []
    rows += [(ability, "score") for ability in _get(report, "abilities", default=[])]
    for row, metric in rows:
        name, value = _public(str(row.get("name", "task"))), _number(_get(row, "after", "value"))
        metrics = [{"type": str(metric), "value": value}] if value is not None else []
        dataset = {"name": name, "type": name}
        yield {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def _verdict(report: Mapping[str, Any]) -> str:
    sentence = _get(report, "verdict", "sentence", default="")
    status = _get(report, "verdict", "status", default="")
    return f"**{_text(status)}**: {_text(sentence)}" if status or sentence else ""


def _use(code: str | None, base: str | None) -> str:
    """How to load it, in the words of the check that was made after the export."""
    if not code:
        return ""
    note = ""
    if base:
        note = (
            "\n\nThe adapter was trained on another adapter, merged into its base. That merged model is in the folder "
            f"{_text(_public(base))} of the run, and `adapter_config.json` names it as the base: on any other base "
            "this adapter does not compute what was measured."
        )
    return f"## Use\n\n{_code(code, 'python')}{note}"


def _measured(report: Mapping[str, Any]) -> str:
    task, abilities = _get(report, "task", default={}), _get(report, "abilities", default=[])
    rows = []
    if task:
        name = f"{_text(_public(str(task.get('name'))))} ({_text(metric_words(task))})"
        rows.append([f"task: {name}", *_pair(task), "", ""])
        rows += [[f"task on {_text(_public(str(s.get('name'))))}", *_pair(s), "", ""] for s in task.get("sets") or []]
    for row in abilities:
        kept, status = _estimate(row.get("retention")), _text(row.get("status") or "-")
        rows.append([_text(row.get("name")), *_pair(row), kept, status])
    note = "Base and tuned model answer the same items. Brackets hold the interval of each number."
    return f"## Before and after\n\n{_table(HEAD, rows)}\n\n{note}" if rows else ""


def _pair(row: Mapping[str, Any]) -> list[str]:
    """The cells items, before and after."""
    items = _get(row, "after", "n", default=_get(row, "before", "n", default="-"))
    return [_text(items), _estimate(row.get("before")), _estimate(row.get("after"))]


def _plan(report: Mapping[str, Any]) -> str:
    rows = []
    for step in _get(report, "plan", default=[]):
        settings = ", ".join(f"{key}={value}" for key, value in (step.get("settings") or {}).items())
        rows.append([_text(step.get("method")), _text(settings) or "defaults", _paper(step.get("paper"))])
    table = _table(("method", "settings", "paper"), rows) if rows else ""
    said = _get(report, "training", "budget", "said", default="")  # what was done to it after the plan
    after = f"After the training: {_text(said)}." if said else ""
    return "\n\n".join(["## Plan", *filter(None, [table, after])]) if table or after else ""


def _paper(paper: Mapping[str, Any] | None) -> str:
    if not paper:
        return "-"
    title, arxiv = _text(paper.get("title") or "untitled"), str(paper.get("arxiv") or "")
    return f"[{title}](https://arxiv.org/abs/{arxiv})" if ARXIV_ID.fullmatch(arxiv) else title


def _papers(report: Mapping[str, Any]) -> str:
    papers = (_paper(step.get("paper")) for step in _get(report, "plan", default=[]))
    unique = dict.fromkeys(paper for paper in papers if paper != "-")
    return "## Papers\n\n" + "\n".join(f"- {paper}" for paper in unique) if unique else ""


def _data(report: Mapping[str, Any]) -> str:
    train, rows = _get(report, "data", "train"), _get(report, "data", "rows")
    if train is None and rows is None:
        return ""
    source = f" from {_text(_public(str(train)))}" if train is not None else ""
    return f"## Data\n\nTrained on {_text('some' if rows is None else rows)} rows{source}."


def _versions(report: Mapping[str, Any]) -> str:
    model = _get(report, "model", default={})
    named = {"base revision": model.get("revision"), "base content": model.get("sha")}
    rows = {**{k: v for k, v in named.items() if v}, **_get(report, "versions", default={})}
    lines = [f"- {_text(key)}: {_text(value)}" for key, value in rows.items()]
    return "## Versions\n\n" + "\n".join(lines) if lines else ""


def _recipe(report: Mapping[str, Any]) -> str:
    import yaml

    recipe = _get(report, "recipe")
    if not recipe:
        return ""
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\n{_code(text, 'yaml')}"
