"""Pictures of a report: small SVGs that reflow with the page, and the trade-off plot for a README.

The pictures of the page use percentages across and pixels down, so that text and dots keep their size on any
screen. Colours come from the classes of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from holdfast.errors import HoldfastError, pip_install

from .schema import clean, estimate, has, has_interval, number, one_line, percent, percent_interval

STRIP_HEIGHT = 30  # pixels of one row of the dot plot
CHART_HEIGHT = 190  # pixels of a line chart, without the labels below it
MOST_POINTS = 300  # a line of more points is thinned: the eye sees no more, and the file stays small


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high` with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Position of a value in percent of the axis, held inside it."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)


def nice_axis(values: Iterable[float | None], goal: int = 4) -> Axis:
    """An axis with about `goal` round steps that reaches around all values."""
    known = [v for v in values if v is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / goal))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= goal + 1e-9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, max(last, first + 1) + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def is_share(values: Iterable[float | None]) -> bool:
    """Whether these look like scores of 0 to 1, give or take the ends of their intervals."""
    return all(-0.5 <= v <= 1.25 for v in values if v is not None)


def share_axis(values: Iterable[float | None]) -> Axis:
    """The axis 0 to 1 with quarter ticks, made longer where an interval reaches beyond."""
    known = [v for v in values if v is not None]
    low = math.floor(20 * min([*known, 0.0])) / 20
    high = math.ceil(20 * max([*known, 1.0])) / 20
    return Axis(low, high, (0.0, 0.25, 0.5, 0.75, 1.0))


def est_values(*estimates: Any) -> list[float]:
    """Every number an axis has to cover for these estimates."""
    there = [e for e in estimates if has(e)]
    return [v for e in there for v in (e["value"], e.get("low"), e.get("high")) if v is not None]


# --- the dot-and-interval plot -------------------------------------------------------------------------


def _dot(est: Any, axis: Axis, y: int, kind: str) -> str:
    if not has(est):
        return ""
    line = ""
    if has_interval(est):
        left, right = axis.at(est["low"]), axis.at(est["high"])
        line = f'<line class="iv {kind}" x1="{left}%" x2="{right}%" y1="{y}" y2="{y}"/>'
    return f'{line}<circle class="dot {kind}" cx="{axis.at(est["value"])}%" cy="{y}" r="4.5"/>'


def _grid(axis: Axis, height: int) -> str:
    return "".join(
        f'<line class="grid" x1="{axis.at(t)}%" x2="{axis.at(t)}%" y1="0" y2="{height}"/>' for t in axis.ticks
    )


def strip_svg(row: dict[str, Any], axis: Axis) -> Markup:
    """One row: before (hollow) above after (filled), each with its interval, and a tick at chance."""
    chance = row.get("chance")
    tick = ""
    if chance is not None:
        x = axis.at(chance)
        tick = f'<line class="chance" x1="{x}%" x2="{x}%" y1="3" y2="{STRIP_HEIGHT - 3}"/>'
    both = [(w, row.get(w)) for w in ("before", "after")]
    words = ", ".join(f"{w} {estimate(e)}" for w, e in both if has(e))
    words += f", chance {number(chance)}" if chance is not None else ""
    dots = _dot(row.get("before"), axis, 10, "before") + _dot(row.get("after"), axis, 20, "after")
    return Markup(
        f'<svg class="strip" width="100%" height="{STRIP_HEIGHT}" role="img" '
        f'aria-label="{escape(one_line(row.get("name") or ""))}: {escape(words)}">'
        f"{_grid(axis, STRIP_HEIGHT)}{tick}{dots}</svg>"
    )


def axis_svg(axis: Axis) -> Markup:
    """The numbers below a column of strips."""
    text = "".join(
        f'<text class="tick" x="{axis.at(t)}%" y="14" text-anchor="middle">{t:g}</text>' for t in axis.ticks
    )
    return Markup(f'<svg class="strip" width="100%" height="20" aria-hidden="true">{text}</svg>')


# --- line charts ---------------------------------------------------------------------------------------


def thin(points: Sequence[Sequence[float | None]], most: int = MOST_POINTS) -> tuple[list[list[float]], int]:
    """Mean of each run of points, so that at most `most` remain, and how many points each mean is of."""
    known = [[float(x), float(y)] for x, y in points if x is not None and y is not None]
    size = max(1, math.ceil(len(known) / most))
    runs = [known[i : i + size] for i in range(0, len(known), size)]
    return [[sum(column) / len(run) for column in zip(*run, strict=True)] for run in runs], size


def _line(kind: str, places: list[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
    return (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="{CHART_HEIGHT}">'
        f'<polyline class="line {kind}" points="{path}" vector-effect="non-scaling-stroke"/></svg>'
    )


def _frame(y: Axis, x_ticks: Sequence[tuple[float, str]], x_name: str) -> str:
    """Grid, numbers at the left (outside the picture, in the padding of its box) and below."""
    parts = []
    for t in y.ticks:
        h = round(CHART_HEIGHT * (1 - y.at(t) / 100), 1)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{h}" y2="{h}"/>')
        parts.append(f'<text class="tick" x="-10" y="{h + 4}" text-anchor="end">{t:,g}</text>')
    for at, label in x_ticks:
        parts.append(
            f'<text class="tick" x="{at:.2f}%" y="{CHART_HEIGHT + 18}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<text class="tick" x="50%" y="{CHART_HEIGHT + 36}" text-anchor="middle">{escape(x_name)}</text>')
    return "".join(parts)


def _chart(label: str, body: str) -> Markup:
    return Markup(
        f'<div class="chart"><svg width="100%" height="{CHART_HEIGHT + 42}" role="img" '
        f'aria-label="{escape(one_line(label))}">{body}</svg></div>'
    )


def shots_svg(curve: dict[str, Any], label: str) -> Markup:
    """Score by number of examples in the prompt, before and after. Steps are drawn equally wide."""
    shots = curve.get("shots") or []
    at = [100 * i / max(1, len(shots) - 1) for i in range(len(shots))]
    y = nice_axis([0.0, *est_values(*(curve.get("before") or []), *(curve.get("after") or []))])
    body = _frame(y, [(a, str(s)) for a, s in zip(at, shots, strict=True)], "examples in the prompt")
    for kind in ("before", "after"):
        there = [(a, e) for a, e in zip(at, curve.get(kind) or [], strict=False) if has(e)]
        line = "".join(_pillar(a, e, y, kind) for a, e in there if has_interval(e))
        line += _line(kind, [(a, 100 - y.at(e["value"])) for a, e in there])
        line += "".join(
            f'<circle class="dot {kind}" cx="{a:.2f}%" cy="{_down(e["value"], y)}" r="4.5"/>' for a, e in there
        )
        # Two pixels to either side, so that equal scores do not hide each other.
        body += f'<g transform="translate({-2.5 if kind == "before" else 2.5} 0)">{line}</g>'
    return _chart(label, body)


def _down(value: float, y: Axis) -> float:
    return round(CHART_HEIGHT * (1 - y.at(value) / 100), 1)


def _pillar(at: float, est: Any, y: Axis, kind: str) -> str:
    low, high = _down(est["low"], y), _down(est["high"], y)
    return f'<line class="iv {kind}" x1="{at:.2f}%" x2="{at:.2f}%" y1="{low}" y2="{high}"/>'


def series_svg(points: Sequence[Sequence[float | None]], label: str) -> Markup:
    """A value by training step. Returns '' for less than two finite points."""
    line, _ = thin(points)
    if len(line) < 2:
        return Markup("")
    y = nice_axis([v for _, v in line] + [0.0])
    first, last = line[0][0], line[-1][0]
    x = Axis(first, last if last > first else first + 1, ())
    ends = [(0.0, f"{first:,.0f}"), (50.0, f"{(first + last) / 2:,.0f}"), (100.0, f"{last:,.0f}")]
    return _chart(label, _frame(y, ends, "step") + _line("after", [(x.at(s), 100 - y.at(v)) for s, v in line]))


# --- the trade-off plot --------------------------------------------------------------------------------

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 20, 56
FONT = 13
LEADER_FROM = 18  # pixels between dot and label from which a thin line joins them
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Mark:
    """One point of the trade-off plot in pixels; `box` is where its label stands."""

    name: str
    x: float
    y: float
    across: tuple[float, float] | None
    down: tuple[float, float] | None
    highlight: bool
    box: Box
    said: str = ""  # both numbers with their intervals, shown to who points at it


def _overlap(a: Box, b: Box) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box) -> float:
    inner = (LEFT + 2, TOP, WIDTH - 4, HEIGHT - BOTTOM - 2)
    sides = (inner[0] - box[0], inner[1] - box[1], box[2] - inner[2], box[3] - inner[3])
    return sum(max(0.0, s) for s in sides)


def _spots(x: float, y: float, name: str) -> Iterable[Box]:
    """Places for a label around a dot, the nearest first: the four corners, then above, below and beside."""
    wide, high = (
        0.62 * FONT * len(name) + 4,
        FONT + 4.0,
    )  # 0.62: wider than any usual sans serif's mean letter
    for far in range(7, 150, 7):
        for slide in (0.0, 0.5, 1.0):  # how far the label hangs back over its dot
            for left, top in (
                (x + far, y - far - high),
                (x - far - wide, y - far - high),
                (x + far, y + far),
                (x - far - wide, y + far),
            ):
                shift = slide * (wide / 2 + far) * (1 if left < x else -1)
                yield left + shift, top, left + shift + wide, top + high
        for left in (x + far, x - far - wide):
            yield left, y - high / 2, left + wide, y + high / 2


def _gap(box: Box, x: float, y: float) -> tuple[float, float, float]:
    """Distance from a dot to the nearest point of a box, and that point."""
    nx, ny = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    return math.hypot(nx - x, ny - y), nx, ny


def _leader_boxes(box: Box, x: float, y: float) -> list[Box]:
    """The thin line from dot to label as small boxes; none where the label stands close."""
    far, nx, ny = _gap(box, x, y)
    if far <= LEADER_FROM:
        return []
    places = [(x + (nx - x) * i / 12, y + (ny - y) * i / 12) for i in range(3, 12)]
    return [(px - 1, py - 1, px + 1, py + 1) for px, py in places]


def _cost(box: Box, x: float, y: float, taken: Sequence[Box], lines: Sequence[Box]) -> float:
    """Overlap counts most, then crossings, then distance."""
    leader = _leader_boxes(box, x, y)
    crossed = sum(1 for t in taken for part in leader if _overlap(part, t))
    covered = sum(1 for line in lines if _overlap(box, line))
    hit = sum(_overlap(box, t) for t in taken)
    return 50 * _outside(box) + 50 * hit + 60 * crossed + 25 * covered + _gap(box, x, y)[0]


def place_labels(dots: Sequence[tuple[float, float]], names: Sequence[str], lines: Sequence[Box] = ()) -> list[Box]:
    """A box (left, top, right, bottom) in pixels for every label.

    Labels keep clear of each other, of every dot and of the frame, and of the interval lines where they can.
    """
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    boxes: list[Box] = []
    for i, ((x, y), name) in enumerate(zip(dots, names, strict=True)):
        others = taken[:i] + taken[i + 1 :]
        best = min(_spots(x, y, name), key=lambda box: _cost(box, x, y, others, lines))
        boxes.append(best)
        taken += [best, *_leader_boxes(best, x, y)]
    return boxes


def _scene(points: Sequence[dict[str, Any]]) -> tuple[list[Mark], Axis, Axis]:
    points = [p for p in clean(list(points)) if has(p.get("task")) and has(p.get("kept"))]
    across = nice_axis([v for p in points for v in est_values(p["task"])], goal=6)
    shares = [v for p in points for v in est_values(p["kept"])]
    down = share_axis([v * 1.02 + 0.04 for v in shares] + shares) if is_share(shares) else nice_axis([*shares, 0.0])

    def px(v: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * across.at(v) / 100

    def py(v: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * down.at(v) / 100

    dots = [(px(p["task"]["value"]), py(p["kept"]["value"])) for p in points]
    spans = [(px(p["task"]["low"]), px(p["task"]["high"])) if has_interval(p["task"]) else None for p in points]
    falls = [(py(p["kept"]["high"]), py(p["kept"]["low"])) if has_interval(p["kept"]) else None for p in points]
    lines = [(s[0], y - 1, s[1], y + 1) for s, (_, y) in zip(spans, dots, strict=True) if s]
    lines += [(x - 1, f[0], x + 1, f[1]) for f, (x, _) in zip(falls, dots, strict=True) if f]
    names = [one_line(p.get("name") or "") for p in points]
    boxes = place_labels(dots, names, lines)
    marks = [
        Mark(name, x, y, span, fall, bool(p.get("highlight")), box, _said(name, p))
        for p, name, (x, y), span, fall, box in zip(points, names, dots, spans, falls, boxes, strict=True)
    ]
    return sorted(marks, key=lambda m: m.highlight), across, down  # the highlighted ones are drawn on top


def _said(name: str, point: dict[str, Any]) -> str:
    kept, span = percent(point["kept"]["value"]), percent_interval(point["kept"])
    return f"{name}: task {estimate(point['task'])}, kept {kept}" + (f" ({span})" if span else "")


_STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#59636e}"
    ".n{fill:#1f2328}.h{fill:#0a6c86;font-weight:600}.g{stroke:#d8dee4}.w{stroke:#8c959f}"
    ".i{stroke:#8c959f;stroke-width:1.5}.d{fill:#59636e}.i.h{stroke:#0a6c86}.d.h{fill:#0a6c86}"
    "@media(prefers-color-scheme:dark){text{fill:#9aa4af}.n{fill:#e6e9ec}.h,.d.h{fill:#5cc3dd}.g{stroke:#30363d}"
    ".w,.i{stroke:#6e7681}.d{fill:#9aa4af}.i.h{stroke:#5cc3dd}}"
    ".m:hover .i{stroke-width:3}.m:hover circle{r:8px}svg:has(.m:hover) .m:not(:hover){opacity:.2}"
)


def _leader(m: Mark) -> tuple[float, float] | None:
    """The end of a thin line from dot to label, only where the label stands far away."""
    far, x, y = _gap(m.box, m.x, m.y)
    return (x, y) if far > LEADER_FROM else None


def _anchor(m: Mark) -> tuple[float, str]:
    """Where the text is held: at the side that faces its dot, for the box is wider than the text."""
    if m.box[0] >= m.x:
        return m.box[0] + 2, "start"
    return (m.box[2] - 2, "end") if m.box[2] <= m.x else ((m.box[0] + m.box[2]) / 2, "middle")


def _mark_svg(m: Mark) -> str:
    tone, out = (" h" if m.highlight else ""), []
    if m.across:
        out.append(
            f'<line class="i{tone}" x1="{m.across[0]:.1f}" x2="{m.across[1]:.1f}" y1="{m.y:.1f}" y2="{m.y:.1f}"/>'
        )
    if m.down:
        out.append(f'<line class="i{tone}" x1="{m.x:.1f}" x2="{m.x:.1f}" y1="{m.down[0]:.1f}" y2="{m.down[1]:.1f}"/>')
    if end := _leader(m):
        out.append(f'<line class="w" x1="{m.x:.1f}" y1="{m.y:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>')
    x, side = _anchor(m)
    out.append(f'<circle class="d{tone}" cx="{m.x:.1f}" cy="{m.y:.1f}" r="{6 if m.highlight else 5}"/>')
    out.append(
        f'<text class="n{tone}" x="{x:.1f}" y="{m.box[3] - 4:.1f}" text-anchor="{side}">{escape(m.name)}</text>'
    )
    return f'<g class="m"><title>{escape(m.said)}</title>{"".join(out)}</g>'


def _axes_svg(across: Axis, down: Axis, x_name: str, y_name: str) -> str:
    out, bottom, right = [], HEIGHT - BOTTOM, WIDTH - RIGHT
    for t in across.ticks:
        x = LEFT + (right - LEFT) * across.at(t) / 100
        out.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{t:g}</text>')
    for t in down.ticks:
        y = bottom - (bottom - TOP) * down.at(t) / 100
        out.append(f'<line class="g" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * t:g} %</text>')
    out.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_name)}</text>')
    at = (TOP + bottom) / 2
    out.append(f'<text transform="translate(14 {at}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>')
    return "".join(out)


def tradeoff_svg(
    points: Sequence[dict[str, Any]], x_name: str = "task score after tuning", y_name: str = "ability kept"
) -> str:
    """Task score (right is better) against ability kept (up is better), one dot a method, 95 % intervals.

    Args:
        points: [{"name", "task": Est, "kept": Est, "highlight": bool}]; `kept` is a fraction, 1.0 is 100 %.
            Points without a value are left out.

    Returns:
        A whole SVG file for light and dark pages. Who points at a dot sees its numbers and the others faded.
    """
    marks, across, down = _scene(points)
    body = _axes_svg(across, down, x_name, y_name) + "".join(map(_mark_svg, marks))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_name)} against {escape(x_name)}"><style>{_STYLE}</style>{body}</svg>\n'
    )


def save_png(
    points: Sequence[dict[str, Any]],
    path: str | Path,
    x_name: str = "task score after tuning",
    y_name: str = "ability kept",
) -> None:
    """The picture of `tradeoff_svg`, drawn at the same places, as a PNG of 1520 x 960 pixels on white.

    Raises:
        HoldfastError: matplotlib is missing. Everything else in a report is drawn without it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        what = f"The picture {path} needs matplotlib, which cannot be imported ({error})."
        raise HoldfastError(what, f"Run: {pip_install('plots')}.") from error

    marks, across, down = _scene(points)
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200)
    FigureCanvasAgg(figure)
    inner = (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
    grid = figure.add_axes(inner, xlim=(across.low, across.high), ylim=(down.low, down.high))
    grid.set_xticks(across.ticks, [f"{t:g}" for t in across.ticks])
    grid.set_yticks(down.ticks, [f"{100 * t:g} %" for t in down.ticks])
    grid.grid(color="#d8dee4")
    grid.tick_params(length=0, labelsize=9, labelcolor="#59636e")
    grid.spines[:].set_visible(False)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))  # pixels, down is positive
    page.axis("off")
    soft: dict[str, Any] = {
        "fontsize": 9,
        "color": "#59636e",
        "ha": "center",
        "va": "center",
        "parse_math": False,
    }
    page.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, x_name, **soft)
    page.text(12, (TOP + HEIGHT - BOTTOM) / 2, y_name, rotation=90, **soft)
    for mark in marks:
        _mark_png(page, mark)
    figure.savefig(path, format="png")


def _mark_png(page: Any, m: Mark) -> None:
    tone = "#0a6c86" if m.highlight else "#59636e"
    if m.across:
        page.plot(m.across, (m.y, m.y), color=tone, alpha=0.6, linewidth=1)
    if m.down:
        page.plot((m.x, m.x), m.down, color=tone, alpha=0.6, linewidth=1)
    if end := _leader(m):
        page.plot((m.x, end[0]), (m.y, end[1]), color="#8c959f", linewidth=0.6)
    page.plot(m.x, m.y, "o", color=tone, markersize=7 if m.highlight else 6)
    x, side = _anchor(m)
    page.text(
        x,
        (m.box[1] + m.box[3]) / 2,
        m.name,
        ha={"start": "left", "end": "right", "middle": "center"}[side],
        va="center",
        fontsize=8.5,
        color=tone if m.highlight else "#1f2328",
        weight="bold" if m.highlight else "normal",
        parse_math=False,  # a name may hold dollar signs
    )
