"""The pages say what the code says: generated pages are fresh, code compiles, recipes load, links lead somewhere."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from holdfast.methods import all_methods
from holdfast.plan import Plan
from holdfast.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def load_tool():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(language: str) -> list:
    """(page, code) of every fenced block of one language."""
    return [
        pytest.param(code, id=f"{page.name}-{n}")
        for page in PAGES
        for n, (kind, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


def slugs(page: Path) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def test_generated_pages_are_up_to_date():
    assert load_tool().stale() == [], "run: python tools/make_docs.py"


def test_every_method_has_a_section_with_its_settings():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name, kind in all_methods().items():
        section = page.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]
        assert all(f"| `{field}` |" in section for field in kind().settings()), name
        assert not kind.paper or kind.paper.title in section


def test_a_method_called_experimental_is_so_wherever_it_is_listed():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, kind in all_methods().items():
        title = (importlib.import_module(kind.__module__).__doc__ or "").split("\n")[0]
        listed = next((line for line in readme.splitlines() if line.startswith(f"| `{name}` |")), kind.does)
        assert {"experimental" in text for text in (title, kind.does, listed)} in ({True}, {False}), name


def test_the_source_of_a_default_is_its_comment():
    from holdfast.methods import KLToBase

    comments = load_tool().comments_of(KLToBase)
    assert comments["weight"] == "the SFT+KL baseline of arXiv 2601.02151"
    assert comments["sources"] == 'for "replay"'  # behind a default of several lines
    assert comments["on"] == ""


def test_a_changed_page_is_noticed(tmp_path, monkeypatch):
    tool = load_tool()
    monkeypatch.setattr(tool, "DOCS", tmp_path)
    assert tool.stale() == ["methods.md", "recipe.md", "suites.md"]
    for path, text in tool.pages().items():
        path.write_text(text, encoding="utf-8")
    assert tool.stale() == []
    (tmp_path / "recipe.md").write_text("old", encoding="utf-8")
    assert tool.stale() == ["recipe.md"]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_compile(code):
    compile(code, "block", "exec")


@pytest.mark.parametrize("code", blocks("python"))
def test_what_python_blocks_import_of_us_is_there(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        else:
            names = [(node.module, alias.name) for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for module, name in names:
            if module.split(".")[0] == "holdfast":
                assert name is None or hasattr(importlib.import_module(module), name), (module, name)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_blocks_are_recipes(code, tmp_path):
    """Whole recipes must load; a plan alone must name methods and settings that exist."""
    data = yaml.safe_load(code)
    if "model" in data:
        (tmp_path / "recipe.yaml").write_text(code, encoding="utf-8")
        data = {"plan": load_recipe(tmp_path / "recipe.yaml").plan}
    Plan.from_recipe(data["plan"] or [])


def test_there_are_blocks_to_check():
    assert blocks("python") and blocks("yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert not anchor or anchor in slugs(target), f"{page.name} links to {link}, which has no such heading"
