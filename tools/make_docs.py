"""Write docs/methods.md, docs/recipe.md, docs/suites.md and the JSON schema of a recipe from the code.

python tools/make_docs.py            # write the pages
python tools/make_docs.py --check    # write nothing; exit 1 if a page is not what the code says
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from holdfast.measure.suites import DEFAULT, SUITES, about
from holdfast.method import SITES, Method
from holdfast.methods import all_methods
from holdfast.recipe import SCHEMA_FILE, json_schema, recipe_schema

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECIPES, POWER = DOCS.parent / "recipes", DOCS.parent / "benchmarks" / "results" / "suite_power.json"
GENERATED = "<!-- Written by tools/make_docs.py: change the code and run it again. -->\n\n"
NEEDS = {
    "base_logits": "the base model's answers, computed once before training, or asked for rows that come later",
    "base_weights": "a copy of the base weights",
    "dense": "the model's own weights (not an adapter, not 4 or 8 bits)",
    "base_hidden": "the base's hidden states",
    "gradients": "the gradients of a step, before anything changes them",
    "live_logits": "one more forward of the rows it chooses among, with the model so far",
}
HEADINGS = "Cost|Combine with|Do not combine with|Differences|Export|Packing in one row"
METHODS_INTRO = """# Methods

A method is one entry of a plan. In a recipe it is a name, or a name with settings:

```yaml
plan:
  - LoRA: {r: 8}
  - ICLAnchor
```

In Python it is a class of `holdfast.methods` with the same settings as keyword arguments. The order of a plan matters
only where [the design](design.md) says so. The last column of a table of settings says where a default comes from;
"ours" means that we chose it.

"""
RECIPE_INTRO = """# Recipe

A recipe is one YAML file. `holdfast tune RECIPE` runs it and `holdfast explain RECIPE` shows what it would do. Only
`model.model_name_or_path` and `data.train` are required. A key that does not exist, a key given twice and a value of
the wrong kind are refused, with the line. `--set training.seed=1` changes a key for one run, as often as needed;
`--set plan.0.LoRA.r=8` reaches into the list of methods. In Python `holdfast.tune("my.yaml")` does the same and
returns the run folder.

Files are looked for beside the recipe first and in the working directory second. `holdfast:` names a file that comes
with the package; `holdfast:demo` is a recipe that does, and its run folder lies in the working directory.

The model may be a PEFT adapter. It is merged into its base, which a plan with an adapter of its own writes as `base/`
beside the new one.

`holdfast init DATA` writes a commented recipe for a data file. Its first line names the JSON schema of recipes, with
which editors complete and check keys while you type; `holdfast recipe --schema` prints it.

"""


SHAPES_INTRO = """In the folder `recipes/`, one for each shape of data; [data](data.md) says what each does with
its rows. Every one runs on a tiny model in the tests. `sst2.yaml` and `rte.yaml` are for labelled sentences, of files
that are not shipped.
"""

POWER_INTRO = """## What they show

How often a true loss of 5 points of the score is called "lost", in 200 simulated checks each
(`benchmarks/suite_power.py`): a tenth of the marks changes both ways, the floor is 0.95, and items of a cluster
(phrasings of a fact) change together, which is the worst that can be. Scores that are graded (language, calibration,
copying) are not in it. Where answers are written, the default asks few, since they cost the most; `--limit` asks more.
What was written by hand is asked first.

"""

SUITES_INTRO = """# Suites

What `holdfast measure` and `holdfast check` can ask a model. `--suite` takes a name of this page, `default`, `all`,
`lm_eval:<task>[:shots]` for any task of lm-evaluation-harness, or `jsonl:<path>` for your own questions
([check](check.md) has the format). `holdfast suites NAME --export FOLDER` writes a suite as tasks that plain `lm_eval`
runs.

All data is written for this project and comes with the package. It measures base against tuned, not one model against
another: some wordings were chosen so that a 135M model is not at chance. A task on which the base is not two standard
errors above chance is "not measurable" and does not count.

In bfloat16 other batches round otherwise, so a score depends a little on `batch_tokens` and on what else is scored:
base and tuned are always scored alike. `--invariant` (in a recipe `measure.invariant: true`) gives each item the same
bits whatever the batches are, on one machine with the same versions and number of threads. Each request then has a
forward of its own and each text is written alone; prefixes are not shared. Scoring 240 in-context items
of SmolLM2-135M in bfloat16 took 5.7 times the CPU seconds (33.8 against 5.9; one thread of a busy 2-core Xeon, torch
2.13 CPU, one run each).

"""


def methods_page() -> str:
    """The whole of docs/methods.md."""
    kinds = all_methods()
    lines = ["| method | sites | what it does |", "|---|---|---|"]
    for name, kind in kinds.items():
        lines.append(f"| [{name}](#{name.lower()}) | {', '.join(kind().sites())} | {kind.does} |")
    sections = [_section(kind) for kind in sorted(kinds.values(), key=_place)]
    return GENERATED + METHODS_INTRO + "\n".join([*lines, "", *sections])


def _place(kind: type[Method]) -> tuple[int, str]:
    """Methods of one folder stand together, the folders in the order of the sites."""
    return SITES.index(kind.__module__.split(".")[2]), kind.__name__


def _section(kind: type[Method]) -> str:
    doc = inspect.getdoc(sys.modules[kind.__module__]) or ""
    parts = [f"## {kind.__name__}", "", _prose(doc), "", *_settings(kind), *_facts(kind), ""]
    return "\n".join(parts)


def _prose(doc: str) -> str:
    """A module docstring as Markdown: indented formulas are code already, its labels start paragraphs."""
    doc = doc.split(":", 1)[1].strip() if re.match(r"\w+: ", doc) else doc
    doc = doc[0].upper() + doc[1:]
    doc = re.sub(rf"(?m)(?:^|(?<=[.;)] ))({HEADINGS}):", r"\n\n**\1:**", doc)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m) +$", "", doc))


def _settings(kind: type[Method]) -> list[str]:
    fields = dataclasses.fields(kind)
    if not fields:
        return ["It has no settings.", ""]
    comments = comments_of(kind)
    rows = [f"| `{f.name}` | {_code(json.dumps(f.default))} | {_words(comments.get(f.name, ''))} |" for f in fields]
    return ["| setting | default | source |", "|---|---|---|", *rows, ""]


def comments_of(kind: type) -> dict[str, str]:
    """Field name -> the comment behind its default, which says where the default comes from; of inherited ones too."""
    out: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("holdfast.methods"):
            out |= _own_comments(base)
    return out


def _own_comments(kind: type) -> dict[str, str]:
    source = inspect.getsource(kind)
    notes = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    out = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            out[node.target.id] = " ".join(notes[n] for n in lines if n in notes)
    return out


def _facts(kind: type[Method]) -> Iterator[str]:
    plain = kind().sites()
    more = [
        f"; with {switch} also {_codes(new)}" for switch, m in _switched(kind) if (new := set(m.sites()) - {*plain})
    ]
    yield f"- Sites: {_codes(plain)}{''.join(more)}."
    if kind.wraps:
        yield "- Wraps the model's layers: one such method a plan, and none that needs the model's own weights."
    for need in sorted(kind().needs):
        yield f"- Needs {NEEDS[need]}."
    for other, why in _clashes(kind):
        yield f"- Refused with {other}: {why}"
    if kind.paper:
        link = f", [arXiv {kind.paper.arxiv}](https://arxiv.org/abs/{kind.paper.arxiv})" if kind.paper.arxiv else ""
        note = f" ({kind.paper.note})" if kind.paper.note else ""
        yield f"- Paper: {kind.paper.title}{link}{note}."


def _clashes(kind: type[Method]) -> Iterator[tuple[str, str]]:
    """(other method, why) in both directions, also those that one switch turns on."""
    for other in all_methods().values():
        for a, b in ((kind, other), (other, kind)):
            for switch, method in _variants(a):
                if b.__name__ in method.refuses:
                    yield f"`{other.__name__}`{f' (if {switch})' if switch else ''}", method.refuses[b.__name__]


def _variants(kind: type[Method]) -> Iterator[tuple[str, Method]]:
    """The method as it is, then with each switch turned the other way where that changes what it refuses."""
    plain: Any = kind()
    yield "", plain
    yield from ((switch, turned) for switch, turned in _switched(kind) if turned.refuses != plain.refuses)


def _switched(kind: type[Method]) -> Iterator[tuple[str, Any]]:
    """The method with each switch turned the other way, and how that is written."""
    for f in dataclasses.fields(kind):
        if isinstance(f.default, bool):
            yield f"`{f.name}: {json.dumps(not f.default)}`", kind(**{f.name: not f.default})


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names, key=SITES.index))


def recipe_page() -> str:
    """The whole of docs/recipe.md."""
    out, section = [], ""
    for line in recipe_schema().splitlines():
        found = re.fullmatch(r"(\S+)\s+(.+?)\s{2,}(.+)", line)
        if not found:
            raise SystemExit(f"recipe_schema() gives a line this page cannot read: {line!r}")
        key, default, words = found.groups()
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            out += ["", f"## {section}", "", "| key | default | meaning |", "|---|---|---|"]
        shown = default if default == "required" else _code(default)
        out.append(f"| `{key}` | {shown} | {_words(words)} |")
    return GENERATED + RECIPE_INTRO + "\n".join(out).lstrip() + "\n" + shapes()


def shapes() -> str:
    """The recipes that come with the repository, as they stand, but those of files that are not shipped."""
    out = ["", "## Recipes to begin with", "", SHAPES_INTRO]
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8").strip()
        if "not shipped" not in text:
            out += [f"### {path.stem.replace('_', ' ')}", "", "```yaml", text, "```", ""]
    return "\n".join(out).rstrip() + "\n"


def suites_page() -> str:
    """The whole of docs/suites.md."""
    lines = ["| suite | in the default | what it measures |", "|---|---|---|"]
    for name in SUITES:
        lines.append(f"| [{name}](#{name}) | {'yes' if name in DEFAULT else ''} | {_words(about(name)[0])} |")
    sections = [f"## {name}\n\n{about(name)[1]}\n" for name in SUITES if name != "anchors"]
    anchors = f"## anchors\n\nAs [in-context](#in-context): {about('anchors')[0]}.\n"
    return GENERATED + SUITES_INTRO + "\n".join([*lines, "", power(), *sections, anchors])


def power() -> str:
    """Which loss a suite shows, as benchmarks/suite_power.py found it."""
    found = json.loads(POWER.read_text(encoding="utf-8"))
    lines = ["| suite | limit | items | answers written | base right | called lost at a loss of 0 | of 5 points |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for r in found["rows"]:
        head = f"| {r['suite']} | {r['limit'] or 'default'} | {r['items']} | {r['written']} | {r['base']:g} |"
        lines.append(f"{head} {r['lost']['0']:.2f} | {r['lost']['5']:.2f} |")
    return POWER_INTRO + "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _words(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    return {
        DOCS / "methods.md": methods_page(),
        DOCS / "recipe.md": recipe_page(),
        DOCS / "suites.md": suites_page(),
        SCHEMA_FILE: json_schema(),
    }


def stale() -> list[str]:
    """Names of the pages that are not what the code says."""
    return [p.name for p, text in pages().items() if not p.is_file() or p.read_text(encoding="utf-8") != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    if parser.parse_args().check:
        found = stale()
        sys.exit(f"Out of date: {', '.join(found)}. Run python tools/make_docs.py." if found else 0)
    DOCS.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
