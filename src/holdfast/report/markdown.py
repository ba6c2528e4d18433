"""The report in a few lines: Markdown for a pull request, JUnit XML for a build server."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

from . import schema

_SPECIAL = re.compile(r"([\\`*_\[\]|~#])")


def escape(text: Any) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table cell."""
    plain = _SPECIAL.sub(r"\\\1", schema.one_line(text))
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _row(name: str, part: dict[str, Any], status: str) -> str:
    scores = [schema.estimate(part.get(w)) for w in ("before", "after")]
    change = schema.estimate(part.get("difference"), sign=True)
    ratio = part.get("retention")
    span = schema.percent_interval(ratio)
    kept = schema.percent(ratio["value"]) + (f" ({span})" if span else "") if schema.has(ratio) else ""
    return f"| {' | '.join([name, *scores, change, kept, status])} |"


def _table(report: dict[str, Any]) -> list[str]:
    rows = []
    task = report.get("task")
    if task:
        name = f"**{escape(task.get('name') or 'task')}** ({escape(schema.metric_words(task))})"
        rows.append(_row(name, {**task, "retention": None}, schema.gain_words(task) or "task"))
        rows += [_row(f"on {escape(s['name'])}", s, schema.gain_words(s)) for s in schema.set_parts(task)]
        rows += [_row(escape(schema.metric_words(o)), o, schema.gain_words(o)) for o in task.get("others") or []]
    for ability in report.get("abilities") or []:
        word = escape(schema.ability_status(ability).word.lower())
        rows.append(_row(escape(ability.get("name") or "?"), ability, f"**{word}**" if word == "lost" else word))
    if not rows:
        return []
    return ["| | before | after | change | kept | status |", "|:--|--:|--:|--:|--:|:--|", *rows, ""]


def summary(report: dict[str, Any]) -> str:
    """Verdict and table for a pull-request comment or a README. Intervals are of 95 %."""
    r = schema.clean(report)
    look = schema.status_of(r.get("verdict"), r.get("kind"))
    names = [escape((r.get(part) or {}).get("name") or "") for part in ("model", "tuned")]
    subject = " &rarr; ".join(n for n in names if n)
    sentence = escape((r.get("verdict") or {}).get("sentence") or "")
    lines = [f"### {look.icon} {escape(look.word)}" + (f": {subject}" if subject else ""), ""]
    lines += [sentence, ""] if sentence else []
    lines += _table(r)
    note = (r.get("task") or {}).get("note")
    lines += [f"Note: {escape(note)}.", ""] if note else []
    lines.append(f"<sub>Holdfast {escape(r.get('holdfast_version') or '')}; in brackets: 95 % intervals.</sub>")
    return "\n".join(lines) + "\n"


def _case(suite: ET.Element, ability: dict[str, Any]) -> str:
    """Add one test case and say how it went: 'passed', 'failures' or 'skipped'."""
    look, words = schema.ability_status(ability), schema.ability_words(ability)
    name = schema.one_line(ability.get("name") or "?")
    case = ET.SubElement(suite, "testcase", classname="holdfast.abilities", name=name, time="0")
    note = schema.one_line(ability.get("note") or "")
    message = f"{look.word}: {words}" + (f". {note}" if note else "")
    if look.tone == "lost":
        ET.SubElement(case, "failure", type="AbilityLost", message=message).text = message
        return "failures"
    if look.tone != "kept":
        ET.SubElement(case, "skipped", message=message)
        return "skipped"
    ET.SubElement(case, "system-out").text = message
    return "passed"


def junit(report: dict[str, Any]) -> str:
    """JUnit XML with one test case for each ability: lost fails, what could not be judged is skipped."""
    r = schema.clean(report)
    abilities = r.get("abilities") or []
    suite = ET.Element("testsuite", name="holdfast")
    ends = [_case(suite, a) for a in abilities]
    suite.attrib.update(
        tests=str(len(ends)),
        failures=str(ends.count("failures")),
        skipped=str(ends.count("skipped")),
        errors="0",
    )
    seconds = sum(s for s in (r.get("timing") or {}).values() if s is not None)
    suite.set("time", f"{seconds:.3f}")
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"
