"""Sections as lines of docs/ruler.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ruler_sections.intervals import TRUTHS
from ruler_sections.lab import Data


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
