"""The report: one safe page, a table for the terminal, Markdown and JUnit, and the trade-off plot."""

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from browser import CHROMIUM, assert_fits
from holdfast.report import markdown, page, plots, schema, terminal
from report_example import est, example, points

VOID = {"meta", "link", "br", "img", "input", "hr"}
NASTY = (
    "<script>alert(1)</script></pre></title></svg>{{7*7}}{% raw %}" + "\x1b[31m\x00\u202e\ud800\" onload='x' ]]> & | `"
)
STATUSES = ("kept", "lost", "unclear", "not measurable")


class Balance(HTMLParser):
    """Collects tags, text and attributes, and fails where a tag closes that is not open."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def poison(value):
    """The same report with the nasty text behind every string and in every key that is data."""
    free = {"settings", "versions", "timing", "terms", "realised_mix"}
    if isinstance(value, dict):
        return {
            k: {f"{q}{NASTY}": poison(w) for q, w in v.items()}
            if k in free and isinstance(v, dict)
            else v
            if k in ("status", "kind")
            else poison(v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [poison(v) for v in value]
    return value + NASTY if value and isinstance(value, str) else value


def shown(report, width=80, **more):
    out = io.StringIO()
    terminal.show(report, Console(file=out, width=width, color_system=None), **more)
    return out.getvalue()


def smallest():
    return {"kind": "check", "verdict": {"status": "not checked", "sentence": ""}, "model": {"name": "m"}}


def test_page_is_balanced_and_says_the_verdict_first():
    made = Balance(page.render(example()))
    assert made.tags.count("h1") == 1
    body = made.text[made.text.index("Lost") :]
    parts = (
        "Lost",
        "0.49 \u2192 0.86",
        "72 %",
        "Every ability and every task",
        "What examples in the prompt",
        "Training",
        "The answers that changed most",
        "The plan",
        "Diagnosis",
        "Details",
    )
    at = [body.index(p) for p in parts]
    assert at == sorted(at)
    assert "in-context 0.47 before, 0.46 after (98 % kept, 95 % interval 94 to 101 %)" in made.text


def test_page_shows_every_task_and_its_interval():
    made = Balance(page.render(example()))
    labels = [v for tag, k, v in made.attributes if tag == "svg" and k == "aria-label"]
    for task in example()["abilities"][0]["tasks"]:
        assert task["name"] in made.text
        label = next(v for v in labels if v.startswith(task["name"] + ":"))
        assert f"before {schema.estimate(task['before'])}, after {schema.estimate(task['after'])}" in label


@pytest.mark.parametrize("report", [example(), poison(example())], ids=["plain", "poisoned"])
def test_page_loads_nothing(report):
    source = page.render(report)
    made = Balance(source)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(made.tags)
    assert not [a for a in made.attributes if a[1] in ("src", "srcset", "data", "action") or a[1].startswith("on")]
    links = [v for _, k, v in made.attributes if k == "href"]
    assert all(v.startswith("https://arxiv.org/abs/") for v in links)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_untrusted_text_is_shown_as_text():
    clean, bad = Balance(page.render(example())), Balance(page.render(poison(example())))
    made = page.render(poison(example()))
    assert "<script" not in made and "49{%" not in made
    assert "<script>alert(1)</script></pre></title></svg>{{7*7}}{% raw %}\\x1b[31m\\x00\\u202e\\ud800" in bad.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", made)
    assert made.encode("utf-8")
    # The paper link is gone, for its number is no arXiv number now; nothing else may differ in structure.
    same = [t for t in clean.tags if t not in ("a", "span")]
    assert [t for t in bad.tags if t not in ("a", "span")] == same


@pytest.mark.parametrize("number", ["2401.01234", "2401.01234v2", "cs.CL/0001001", "arXiv:1606.09282"])
def test_arxiv_numbers_become_links(number):
    assert page.arxiv_url(number) == "https://arxiv.org/abs/" + number.removeprefix("arXiv:")


@pytest.mark.parametrize("number", ["", None, "javascript:alert(1)", "2401.0123\n4", "1/2", '2401.01234"x', 7])
def test_other_paper_numbers_do_not(number):
    assert page.arxiv_url(number) is None


@pytest.mark.parametrize("gone", sorted(example()))
@pytest.mark.parametrize("how", ["missing", "none"])
def test_any_part_may_be_missing(gone, how):
    report = example()
    report.pop(gone) if how == "missing" else report.update({gone: None})
    Balance(page.render(report))
    assert shown(report) and markdown.summary(report) and ET.fromstring(markdown.junit(report)) is not None


def holes(value, path=()):
    """The path of every inner field of a report."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield (*path, k)
            yield from holes(v, (*path, k))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from holes(value[0], (*path, 0))


@pytest.mark.parametrize("path", list(holes(example())), ids=lambda p: ".".join(map(str, p)))
def test_any_inner_field_may_be_none(path):
    report = copy.deepcopy(example())
    inner = report
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = None
    texts = (
        Balance(page.render(report)).text,
        shown(report),
        markdown.summary(report),
        markdown.junit(report),
    )
    assert all(texts) and not [t for t in texts if "None" in t]


def test_smallest_report_has_no_empty_sections():
    made = Balance(page.render(smallest()))
    assert "Not checked" in made.text
    for word in ("Every ability", "Training", "The plan", "Diagnosis", "changed most", "None"):
        assert word not in made.text


def test_not_a_number_and_numbers_beyond_the_axis_are_drawn_inside():
    report = example()
    report["abilities"][0]["before"] = {"value": float("nan"), "low": None, "high": None, "n": 0}
    report["abilities"][1]["after"] = est(37.5, 10, 3)
    report["training"]["loss"][3][1] = math.inf
    made = page.render(report)
    assert "nan" not in Balance(made).text.lower() and "inf%" not in made
    across = [float(v) for v in re.findall(r'(?:cx|x1|x2)="(-?[0-9.]+)%"', made)]
    assert across and min(across) >= 0 and max(across) <= 100


@pytest.mark.parametrize("status", [*STATUSES, "not checked"])
def test_status_is_a_word_an_icon_and_a_colour(status):
    report = example()
    report["verdict"]["status"] = status
    look = schema.STATUS[status]
    made = page.render(report)
    assert f'<div class="verdict {look.tone}">' in made and f"<h1>{look.word}</h1>" in made
    assert f'<span class="icon" aria-hidden="true">{look.icon}</span>' in made
    assert look.word.upper() in shown(report)
    assert look.word in markdown.summary(report).splitlines()[0]


def test_statuses_differ_without_colour():
    looks = [schema.STATUS[s] for s in ("kept", "lost", "unclear", "not measurable")]
    assert len({look.icon for look in looks}) == len({look.tone for look in looks}) == 4


def measured():
    report = {**smallest(), "kind": "measure"}
    return {**report, "abilities": [{"name": "facts", "before": est(0.4), "after": None, "tasks": []}]}


def test_a_measurement_judges_nothing():
    made = Balance(page.render(measured())).text
    assert "Measured" in made and "facts 0.40 (95 % interval 0.34 to 0.46)" in made
    assert "Lost" not in made and "Kept" not in made
    assert "MEASURED" in shown(measured())


@pytest.mark.parametrize("report", [example(), poison(example()), measured(), smallest()])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_terminal_keeps_inside_its_width(report, width):
    assert max(map(len, shown(report, width).splitlines())) <= width


def test_terminal_says_it_at_a_glance():
    out = shown(example(), page="runs/x/report.html")
    for words in (
        "sst2",
        "0.49",
        "0.86",
        "+0.37",
        "in-context",
        "0.45 to 0.49",
        "98 %",
        "94 to 101 %",
        "kept",
    ):
        assert words in out
    assert out.splitlines()[-1] == "Page: runs/x/report.html"
    assert "LOST  The task was learned" in out


def test_terminal_reads_no_markup_and_no_escape_codes():
    report = example()
    report["abilities"][0]["name"] = "[red]x[/nope]\x1b[2J"
    out = shown(report)
    assert "[red]x[/nope]" in out.replace("\n", "") and "\x1b" not in out


def columns(line):
    return len(re.findall(r"(?:\\.|[^|\\])+", line.strip()[1:-1]))


@pytest.mark.parametrize("report", [example(), poison(example()), measured()])
def test_markdown_rows_have_equal_columns(report):
    rows = [line for line in markdown.summary(report).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(report["abilities"]) + bool(report.get("task"))
    assert {columns(r) for r in rows} == {6}


def test_markdown_escapes():
    assert markdown.escape("a|b\n*c* <i> \\| `d`") == r"a\|b \*c\* &lt;i&gt; \\\| \`d\`"
    assert "<script" not in markdown.summary(poison(example()))
    assert "| world facts | 0.29 (0.25 to 0.33) | 0.21 (0.17 to 0.25) |" in markdown.summary(example())


@pytest.mark.parametrize("report", [example(), poison(example())])
def test_junit_fails_what_is_lost_and_skips_what_is_unsure(report):
    suite = ET.fromstring(markdown.junit(report)).find("testsuite")
    assert suite is not None
    ends = [[child.tag for child in case] for case in suite]
    assert ends == [["system-out"], ["skipped"], ["failure"], ["skipped"]]
    assert [suite.get(k) for k in ("tests", "failures", "skipped", "errors")] == ["4", "1", "2", "0"]
    assert "700 would be enough" in str(suite[1][0].get("message"))
    assert str(suite[2].get("name")).startswith("world facts")
    assert suite[2].get("name") == schema.clean(report)["abilities"][2]["name"]


def test_report_survives_json():
    assert page.render(json.loads(json.dumps(example()))) == page.render(example())


def test_write_makes_folders(tmp_path):
    path = page.write(poison(example()), tmp_path / "a" / "b.html")
    assert path.read_text(encoding="utf-8") == page.render(poison(example()))


def test_report_is_not_changed():
    report = example()
    page.render(report), shown(report), markdown.summary(report), markdown.junit(report)
    assert report == example()


@pytest.mark.parametrize(
    ("value", "sign", "words"),
    [
        (0.471, False, "0.47"),
        (-0.001, True, "0.00"),
        (0.3, True, "+0.30"),
        (12.34, False, "12.3"),
        (None, False, "n/a"),
        (1234.5, False, "1,234"),
        (-0.25, False, "-0.25"),
    ],
)
def test_number(value, sign, words):
    assert schema.number(value, sign) == words


@pytest.mark.parametrize(
    ("s", "words"), [(0.42, "0.4 s"), (59.7, "1 min 00 s"), (192, "3 min 12 s"), (7500, "2 h 05 min")]
)
def test_duration(s, words):
    assert schema.duration(s) == words


@pytest.mark.parametrize("values", [[0.2, 0.9], [3.0, 18.2], [-4.0, -4.0], [1e-6, 2e-6], [0.0], [], [5e8, 6e8]])
def test_axis_reaches_around_its_values(values):
    axis = plots.nice_axis(values)
    assert axis.low < axis.high and len(axis.ticks) <= 8
    assert all(axis.low <= v <= axis.high for v in values)


def test_thin_keeps_the_mean_and_drops_holes():
    line, size = plots.thin([(i, i) for i in range(1000)] + [(1000, None)], most=100)
    assert size == 10 and len(line) == 100
    assert line[0] == [4.5, 4.5] and sum(v for _, v in line) / 100 == pytest.approx(499.5)


def crowd():
    """Eight methods with nearly one score: the worst case for labels."""
    return [
        {
            "name": f"method number {i}",
            "task": est(0.86 + i / 500, 300),
            "kept": est(0.95, 300, 0.03),
            "highlight": i == 0,
        }
        for i in range(8)
    ]


@pytest.mark.parametrize("given", [points(), crowd()], ids=["usual", "crowd"])
def test_labels_of_the_tradeoff_do_not_overlap(given):
    marks, _, _ = plots._scene(given)
    assert len(marks) == len(given)
    for a, b in combinations(marks, 2):
        assert plots._overlap(a.box, b.box) == 0
    for mark in marks:
        assert plots._outside(mark.box) == 0
        assert all(plots._overlap(mark.box, (m.x - 5, m.y - 5, m.x + 5, m.y + 5)) == 0 for m in marks)


def test_tradeoff_svg_is_xml_and_escaped():
    given = [*points(), {"name": NASTY, "task": est(0.6), "kept": est(0.5), "highlight": False}]
    root = ET.fromstring(plots.tradeoff_svg(given))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(p["name"] in texts for p in points())
    assert any(t and t.startswith("<script>") for t in texts)
    said = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any("task 0.60 (" in t and "kept 50 % (" in t for t in said) and len(said) == len(given)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == len(given)


def test_tradeoff_without_points_or_intervals():
    ET.fromstring(plots.tradeoff_svg([]))
    bare = [
        {"name": "a", "task": {"value": 0.5}, "kept": {"value": 0.9}},
        {"name": "b", "task": None, "kept": None},
    ]
    assert plots.tradeoff_svg(bare).count("<circle") == 1


def test_save_png(tmp_path):
    plots.save_png([*points(), {"name": "$x_1$ $", "task": est(0.6), "kept": est(0.5)}], tmp_path / "t.png")
    head = (tmp_path / "t.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1520, 960)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the width of the page is not looked at")
@pytest.mark.parametrize("report", [example(), poison(example())], ids=["plain", "poisoned"])
def test_page_fits_phone_and_desktop(report, tmp_path):
    report["examples"][0]["after"] = "x" * 5000
    report["diagnosis"][0]["table"][0] += ["a column"] * 60
    assert_fits(page.render(report).replace("<details>", "<details open>"), tmp_path)
