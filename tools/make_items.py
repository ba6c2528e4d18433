"""Write the made items of the suites instructions, format, thinking and tools, beside those that were written by hand.

Each item is a template of tools/items/*.txt with words filled in, in a fixed order, nothing drawn. Of a request for a
form there is also an answer that keeps it: an item whose answer its own checks refuse is an error here, and the answer
is not written. With `--check`, write nothing and fail if a file is out of date.

A line of a list of templates is

    request | checks | an answer that keeps them      (instructions, format)
    question | number or word                          (thinking)
    request | arguments as JSON                        (tools)

with {names} that the lines under it fill, one item a line, their values in the order of the names, parted by " / ",
"-" for nothing. A line without any of it is a request to be answered in words.
A check is `name argument argument`, checks are parted by "; ", and "_" is a blank. {name+} is the value of a name with
a capital letter, {name^} all of it in capitals, {name~} every word with a capital letter; {{ and }} are braces.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holdfast.measure.verify import obeys

HERE = Path(__file__).parent / "items"
DATA = Path(__file__).resolve().parents[1] / "src/holdfast/measure/suites/data"
NAME = re.compile(r"\{(\w+)([+^~]?)\}")
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
COUNTS = set("words_at_most words_exactly sentences bullets numbered lines comma_list json_list numbers".split())
FORMS = {"": str, "+": str.capitalize, "^": str.upper, "~": str.title}


def blocks(text: str) -> Iterator[tuple[str, str, list[list[str]]]]:
    """(task, template, lines of values); a task begins with a line `# task`, values are indented."""
    task, template, values = "", "", list[list[str]]()
    for line in [*text.splitlines(), "# end"]:
        if not line.strip():
            continue
        if line.startswith("  "):
            values.append(["" if value == "-" else value for value in line.strip().split(" / ")])
            continue
        if template:
            yield task, template, values or [[]]
        template, values = ("", []) if line.startswith("# ") else (line, [])
        task = line[2:] if line.startswith("# ") else task


def filled(template: str, values: list[str]) -> list[str]:
    """The parts of a template with their names filled in."""
    names = list(dict.fromkeys(name for name, _ in NAME.findall(template)))
    assert len(names) == len(values), (template, values)
    known = dict(zip(names, values, strict=True))
    parts = (NAME.sub(lambda m: FORMS[m[2]](known[m[1]]), part).strip() for part in template.split(" | "))
    return [part.replace("{{", "{").replace("}}", "}") for part in parts]


def items(name: str) -> Iterator[tuple[str, list[str]]]:
    """(task, parts) of every item of one file."""
    for task, template, lines in blocks((HERE / f"{name}.txt").read_text(encoding="utf-8")):
        for values in lines:
            yield task, filled(template, values)


def _check(told: str) -> list[Any]:
    """A check as data: [name, *arguments]."""
    name, *words = told.split()
    words = [word.replace("_", " ") for word in words]
    if name in COUNTS:
        return [name, *(int(NUMBERS.get(word, word)) for word in words)]
    return [name, *words[:-1], int(NUMBERS.get(words[-1], words[-1]))] if name == "times" else [name, *words]


def requests(name: str) -> dict[str, list[Any]]:
    """{task: [{"request", "checks"}]} of a suite whose answers checks judge; plain requests where there are none."""
    out: dict[str, list[Any]] = {}
    for task, parts in items(name):
        if len(parts) == 1:
            out.setdefault(task, []).append(parts[0])
            continue
        request, told, answer = parts
        checks = [_check(one) for one in told.split("; ")]
        answer = ast.literal_eval(f"'''{answer} '''").strip()
        assert obeys(answer, checks), (request, checks, answer)
        assert request.casefold() not in answer.casefold(), request
        out.setdefault(task, []).append({"request": request, "checks": checks})
    return out


def questions() -> list[dict[str, str]]:
    """Questions of the thinking suite."""
    return [
        {"question": q, "number" if answer.isdecimal() else "word": answer} for _, (q, answer) in items("thinking")
    ]


def calls() -> dict[str, dict[str, list[Any]]]:
    """{function: {"calls": [{"request", "arguments"}], "none": [request]}}."""
    out: dict[str, dict[str, list[Any]]] = {}
    for task, parts in items("tools"):
        kinds = out.setdefault(task, {"calls": [], "none": []})
        if len(parts) == 1:
            kinds["none"].append(parts[0])
        else:
            kinds["calls"].append({"request": parts[0], "arguments": json.loads(parts[1])})
    return out


MADE = {
    "instructions": lambda: requests("instructions"),
    "format": lambda: requests("format"),
    "thinking": questions,
    "tools": calls,
}


def render(name: str) -> str:
    """The JSON text of the made items of a suite, one a line."""
    about = f"Made by tools/make_items.py from tools/items/{name}.txt; written for Holdfast."
    return f'{{"about": {json.dumps(about)},\n"made": {_lines(MADE[name]())}}}\n'


def _lines(value: Any, pad: str = " ") -> str:
    """Lists one entry a line, and what holds lists as well."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + json.dumps(one) for one in value) + "]"
    rows = (f"{pad}{json.dumps(key)}: {_lines(one, pad + ' ')}" for key, one in value.items())
    return "{\n" + ",\n".join(rows) + "}"


def main(argv: list[str] | None = None) -> int:
    """Write the data, or with `--check` return 1 if a file is out of date."""
    parser = argparse.ArgumentParser(description="Write the made items of some suites.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is out of date")
    check, late = parser.parse_args(argv).check, []
    for name in MADE:
        path = DATA / f"{name}_made.json"
        if not check:
            path.write_text(render(name), encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != render(name):
            late.append(path.name)
    if late:
        print(f"out of date: {', '.join(late)}; run python tools/make_items.py", file=sys.stderr)
    return bool(late)


if __name__ == "__main__":
    sys.exit(main())
