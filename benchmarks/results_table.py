"""Turns benchmarks/results/*.json and overhead.json into docs/results.md and docs/tradeoff.png."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from holdfast.measure import stats
from holdfast.report import plots
from leaderboard_plans import BATCH, STEPS, TABLE, TEST, plans

MARKS = ("<!-- results -->", "<!-- end of results -->")
SHORT = {
    "base": "none (base)",
    "full": "full fine-tuning",
    "lora lr 1e-3": "LoRA at its best learning rate",
    "lora + replay": "LoRA + 10 % general data",
    "half fine-tuning": "half fine-tuning",
    "kl to base (task)": "KL to the base on the task",
    "wise-ft": "WiSE-FT, alpha 0.5",
    "promot": "ProMoT",
    "in-context mix": "few-shot rows of other tasks",
    "default": "LoRA + ICLAnchor, the default of `holdfast tune`",
}
PLAIN = ("full", "lora")
NAMES = {"tickets": "Tickets", "sst2": "SST-2", "rte": "RTE", "agnews": "AG News"}


def load(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(data, method) -> runs, one per seed."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "held_out" in run:
            runs.setdefault((run["data"], run["method"]), []).append(run)
    return runs


def kept(base: dict[str, Any], runs: list[dict[str, Any]], what: str) -> stats.Ratio:
    """Share of base kept, chance-corrected, over all seeds; the interval is over items, clustered by item."""
    chance = base["chance"] if what == "held_out" else dict.fromkeys(base["shared"], 0.0)
    tasks = {}
    for name, items in base[what].items():
        b, t, c = [], [], []
        for run in runs:
            b, t, c = b + items, t + run[what][name], c + list(range(len(items)))
        tasks[name] = (b, t, c)
    usable = {n: v for n, v in tasks.items() if stats.measurable(base[what][n], None, chance[n])}
    return stats.retention(usable, chance)


def accuracy(runs: list[dict[str, Any]]) -> stats.Estimate:
    items = [x for run in runs for x in run["task"]]
    clusters = [i for run in runs for i in range(len(run["task"]))]
    return stats.mean(items, clusters if len(runs) > 1 else None)


def share(ratio: stats.Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.defined else "n/a"


def rows(runs: dict, data: str, overhead: dict[str, float]) -> list[str]:
    """The table of one data set, in the order of `TABLE`, then what was swept."""
    base = runs[data, "base"][0]
    names = [*TABLE, *(n for n in plans() if " lr " in n and n not in TABLE)]
    out = ["| training | seeds | task accuracy | held-out ICL kept | other authors' ICL kept | time |"]
    out.append("|---|---|---|---|---|---|")
    for name in names:
        found = runs.get((data, name))
        if not found:
            continue
        a = accuracy(found)
        cells = ["1.00", "1.00"] if name == "base" else [share(kept(base, found, w)) for w in ("held_out", "shared")]
        spread = f", runs {min(mean(r['task']) for r in found):.3f} to {max(mean(r['task']) for r in found):.3f}"
        time = "" if name not in overhead else f"{overhead[name]:.2f}"
        out.append(
            f"| {name} | {len(found)} | {a.value:.3f} ({a.low:.2f} to {a.high:.2f}{spread if len(found) > 1 else ''}) "
            f"| {cells[0]} | {cells[1]} | {time} |"
        )
    return out


def targets(runs: dict, overhead: dict[str, Any]) -> list[str]:
    """The default beside the best plain run of each data set: what it is meant to reach, and what it reached."""
    out = ["## The default against plain tuning", ""]
    out.append("| data | best plain run | its accuracy | default | held-out kept | other authors' kept | time |")
    out.append("|---|---|---|---|---|---|---|")
    for data, title in NAMES.items():
        plain = {n: accuracy(r).value for (d, n), r in runs.items() if d == data and n.split(" lr ")[0] in PLAIN}
        if not plain or (data, "default") not in runs:
            continue
        best, base, found = max(plain, key=lambda n: plain[n]), runs[data, "base"][0], runs[data, "default"]
        held, other = (share(kept(base, found, what)) for what in ("held_out", "shared"))
        time = overhead.get(data, {"ratio": {}})["ratio"].get("default")
        cells = [title, f"{best} (of {len(plain)})", f"{plain[best]:.3f}", f"{accuracy(found).value:.3f}", held, other]
        out.append(f"| {' | '.join(cells)} | {'' if time is None else f'{time:.2f}'} |")
    return [*out, ""]


def points(runs: dict, data: str, names: list[str]) -> list[dict[str, Any]]:
    base = runs[data, "base"][0]
    out = []
    for name in names:
        found = runs.get((data, name))
        if found:
            r = kept(base, found, "held_out") if name != "base" else stats.Ratio(1.0, 1.0, 1.0, True)
            out.append(
                {
                    "name": name,
                    "task": accuracy(found).to_dict(),
                    "kept": {"value": r.value, "low": r.low, "high": r.high, "n": 0},
                    "highlight": name == "default",
                }
            )
    return out


def readme(runs: dict, path: Path) -> None:
    """Put the short table on the first screen of the README, between its marks."""
    base, lines = (
        runs["sst2", "base"][0],
        ["| training | SST-2 accuracy | in-context learning kept |", "|---|---|---|"],
    )
    for name in SHORT:
        found = runs.get(("sst2", name))
        if found:
            share_kept = "1.00" if name == "base" else share(kept(base, found, "held_out"))
            bold = "**" if name == "default" else ""
            lines.append(f"| {bold}{SHORT[name]}{bold} | {accuracy(found).value:.2f} | {share_kept} |")
    head, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    text = f"{head}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}" + rest.split(MARKS[1])[1]
    path.write_text(text, encoding="utf-8")


def write(folder: Path, docs: Path) -> None:
    """Write docs/results.md, docs/tradeoff.png and the README's table."""
    runs = load(folder)
    path = folder / "overhead.json"
    overhead = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    base = {d: mean(mean(v) for v in runs[d, "base"][0]["held_out"].values()) for d in NAMES if (d, "base") in runs}
    text = [
        "# Results",
        "",
        "What each method learns and what it keeps, on SmolLM2-135M-Instruct. Produced by `benchmarks/results.py`;",
        "do not edit by hand. `make results` goes on where it stopped.",
        "",
        f"Every run: {STEPS} steps of {BATCH} rows, AdamW, linear schedule, bf16 compute; the same rows",
        f"in the same order for every method. Task accuracy on {TEST['sst2']} test rows (tickets, RTE, AG News:",
        f"{TEST['tickets']}; likeliest label). In-context learning (ICL): greedy exact match at 8 shots; held-out:",
        f"the built-in held-out tasks in three formats each (base {next(iter(base.values())):.3f}); other authors': 12",
        "tasks of the function-vectors data, in their own format.",
        "Kept: tuned over base, corrected for chance, 95 % interval over items (tasks whose base is not above chance",
        "are left out). With two seeds the interval clusters the seeds' answers to the same item; the spread between",
        "runs is given beside the accuracy. Two seeds are few: differences within the spread are noise.",
        "",
        "time: training time relative to the plain tuning of the same kind (full or LoRA), base answers included;",
        "measured separately, alternating on a quiet machine.",
        *(o["note"] for o in overhead.values()),
        "",
        *targets(runs, overhead),
    ]
    for data, title in NAMES.items():
        if (data, "base") in runs:
            text += [f"## {title}", "", *rows(runs, data, overhead.get(data, {"ratio": {}})["ratio"]), ""]
    (docs / "results.md").write_text("\n".join(text), encoding="utf-8")
    best = points(runs, "sst2", TABLE)
    readme(runs, docs.parent / "README.md")
    plots.save_png(best, docs / "tradeoff.png", x_name="SST-2 accuracy", y_name="in-context learning kept")
