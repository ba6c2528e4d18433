"""The house has floors: a module imports from its own floor or from below, never from above, and never in a circle.

Imports inside functions and under TYPE_CHECKING count like any other, and so do names of modules in strings.
"""

import ast
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
FLOORS = (  # lowest first; a package stands for its modules, unless one of them has a floor of its own
    {"errors", "versions"},
    {"files", "report.schema"},  # the shape of a report: no code of ours, filled in on many floors
    {"engine"},
    {"foreign_keys"},
    {"recipe"},
    {"data"},
    {"models"},
    {"measure"},
    {"services", "method", "sites", "methods", "plan", "session"},  # the law
    {"hosts", "decode"},
    {"report", "diagnose"},
    {"runs"},  # what verbs share
    {"verbs"},
    {"cli"},
    {"holdfast", "__main__"},  # the door: names what a user imports, and `python -m holdfast`
)


def modules(src: Path = SRC) -> dict[str, Path]:
    paths = {".".join(p.relative_to(src).with_suffix("").parts): p for p in sorted(src.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def floor_of(module: str) -> int | None:
    """The floor of a module, of the longest name that it begins with."""
    name = module.removeprefix("holdfast.")
    while name:
        found = [n for n, names in enumerate(FLOORS) if name in names]
        if found:
            return found[0]
        name = name.rpartition(".")[0]
    return None


def named_in(source: str, package: str, known: Collection[str]) -> Iterator[str]:
    """The modules that a module imports or spells out in a string; `from a import b` means a.b if that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (full if (full := f"{base}.{a.name}") in known else base for a in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value


def graph(src: Path = SRC) -> dict[str, set[str]]:
    """Module -> modules of the house that it imports."""
    known, out = modules(src), {}
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = set(named_in(path.read_text(encoding="utf-8"), package, known))
        out[module] = found & set(known) - {module}
    return out


def test_every_module_has_a_floor():
    assert [m for m in modules() if floor_of(m) is None] == [], "give it a place in FLOORS"
    standing = {name for names in FLOORS for name in names if name != "holdfast"}
    assert not [name for name in standing if f"holdfast.{name}" not in modules()]


def test_nobody_imports_from_above():
    found = {(m, n) for m, names in graph().items() for n in names if floor_of(n) > floor_of(m)}
    assert sorted(found) == []


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_there_is_no_circle(folder):
    try:
        TopologicalSorter(graph(SRC.parent / folder)).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


@pytest.mark.parametrize(
    "line",
    [
        "import house.b",
        "from house import b",
        "from house.b import x",
        "from . import b",
        "from .b import x",
        "def f():\n    from house.b import x",
        "if TYPE_CHECKING:\n    import house.b",
        "WHERE = 'house.b'",
    ],
)
def test_every_way_to_import_is_seen(tmp_path, line):
    (tmp_path / "house").mkdir()
    for name, text in (("__init__", ""), ("a", line), ("b", "from house import a")):
        (tmp_path / "house" / f"{name}.py").write_text(text)
    assert graph(tmp_path)["house.a"] == {"house.b"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path)).prepare()
