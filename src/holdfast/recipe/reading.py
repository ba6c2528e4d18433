"""A recipe from its file: overrides, where each key stands, and one sentence for whatever is wrong with it."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from holdfast.errors import DataError, RecipeError, suggest
from holdfast.foreign_keys import FOREIGN
from holdfast.recipe.dialect import Loader
from holdfast.recipe.names import KEY_KINDS, RECIPE_DIR, SHIPPED, default_name, locate
from holdfast.recipe.schema import section_of
from holdfast.recipe.sections import ONE, ROLES, SEVERAL, Recipe, Section, Source

Where = dict[tuple[str, ...], str]  # place of each key: file:line, or the override that set it


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b=c` overrides, check it, and find its local data files.

    `holdfast:demo` is the recipe that comes with the package; its run folder lies in the working directory.

    Raises:
        RecipeError: anything wrong with the file, a key, a value or an override; names the line.
    """
    data, where = _parse(_text(Path(path)), str(path))
    for override in overrides:
        _override(data, where, override)
    return _resolved(recipe_from(data, where=where), Path(path).parent)


def recipe_from(data: Mapping[str, Any], *, where: Where | None = None) -> Recipe:
    """Check a mapping in the shape of a recipe. `where` gives the place of each key for messages."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # an unknown key explains a missing one, so it goes first
        first = min(error.errors(), key=lambda e: e["type"] not in KEY_KINDS)
        raise _explained(first, where or {(): "recipe"}) from None


def _shipped(name: str) -> Path:
    """The file of a recipe that comes with the package."""
    known = {p.stem: p for p in RECIPE_DIR.glob("*.yaml")}
    if name not in known:
        what = f"{SHIPPED}{name} is no recipe that comes with the package."
        raise RecipeError(what, suggest(SHIPPED + name, [SHIPPED + k for k in known]))
    return known[name]


def _text(path: Path) -> str:
    if str(path).startswith(SHIPPED):
        path = _shipped(str(path).removeprefix(SHIPPED))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file.", "Check the path of the recipe.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}.", "A recipe is a YAML file in UTF-8.") from None
    if not text.strip():
        raise RecipeError(f"{path}: the file is empty.", "A recipe needs at least model and data.")
    return text


def _parse(text: str, path: str) -> tuple[dict[str, Any], Where]:
    """Return the data of a YAML text and the line of each key."""
    where: Where = {(): path}
    try:
        _refuse_aliases(text, path)
        loader = Loader(text)
        node = loader.get_single_node()
        _mark(node, (), path, where)
        data = loader.construct_document(node) if node else None
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _broken(error, path) from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: holds no keys.", "A recipe is a mapping: model, data, training, ...")
    return data, where


def _refuse_aliases(text: str, path: str) -> None:
    """Refuse `*alias`: a few nested ones make a file of a hundred bytes fill the memory."""
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise RecipeError(f"{path}:{line}: *{event.anchor} is a YAML alias.", "Write the value out.")


def _broken(error: Exception, path: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}" if mark else path
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "could not determine a constructor" in problem:
        tag = problem.rsplit("tag ", 1)[-1]
        return RecipeError(f"{place}: the YAML tag {tag} is refused.", "Write plain values, without tags.")
    return RecipeError(f"{place}: not valid YAML ({problem}).", "Check the indent, quotes and colons there.")


def _mark(node: Any, at: tuple[str, ...], path: str, where: Where) -> None:
    """Note the line of every key and list entry; refuse a key given twice."""
    if isinstance(node, yaml.SequenceNode):
        pairs = [(str(i), child, child) for i, child in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        pairs = [(str(key.value), key, child) for key, child in node.value]
    else:
        return
    for key, marked, child in pairs:
        place = f"{path}:{marked.start_mark.line + 1}"
        here = (*at, key)
        if here in where:
            what = f"{place}: {_dotted(here)} is given twice (first at {where[here]})."
            raise RecipeError(what, "Keep one of the two.")
        where[here] = place
        _mark(child, here, path, where)


def _override(data: dict[str, Any], where: Where, text: str) -> None:
    """Apply one `a.b=c`; list entries are addressed by number, `plan.0.LoRA.r=8`."""
    dotted, equals, value = text.partition("=")
    keys = dotted.strip().split(".")
    place = f"{where[()]}, override {text!r}"
    if not equals or not all(keys):
        raise RecipeError(f"{place}: not of the form key=value.", "Write for example training.seed=1.")
    at: Any = data
    for i, key in enumerate(keys[:-1]):
        at = _enter(at, key, keys[i + 1], place)
    index: Any = _index(at, keys[-1], place)
    try:
        parsed = yaml.load(value, Loader=Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"{place}: the value is not valid YAML.", "Put quotes around text.") from None
    at[index] = parsed
    here = tuple(keys)
    for inner in [loc for loc in where if loc[: len(here)] == here]:
        del where[inner]  # lines of what the override replaced
    where[here] = place


def _enter(at: Any, key: str, after: str, place: str) -> Any:
    """Step into at[key], making a section of what is empty or in its short form."""
    index: Any = _index(at, key, place)
    value = at.get(index) if isinstance(at, dict) else at[index]
    if value is None:
        value = {}
    elif isinstance(value, str) and isinstance(at, list) and value == after:
        value = {value: {}}  # plan: [LoRA] is short for [{LoRA: {}}]
    elif isinstance(value, str) and after in Source.model_fields:
        value = {"path": value}  # train: file is short for {path: file}
    if not isinstance(value, dict | list):
        raise RecipeError(f"{place}: {key} is {value!r}, and has no {after} inside.", "Check the key.")
    at[index] = value
    return value


def _index(at: Any, key: str, place: str) -> str | int:
    if isinstance(at, dict):
        return key
    if not key.isdecimal() or int(key) >= len(at):
        raise RecipeError(f"{place}: the list has no entry {key}.", f"It has {len(at)}, counted from 0.")
    return int(key)


def _keys_at(loc: tuple[str | int, ...]) -> list[str]:
    """The known keys of the section at loc."""
    section: type[Section] = Recipe
    for key in (k for k in loc if isinstance(k, str)):
        section = section_of(section.model_fields[key].annotation) or section
    return list(section.model_fields)


def _near(key: str, known: list[str]) -> str:
    """The known key that was meant: here under another name, or the same or a like name in a section."""
    sections = {name: section_of(field.annotation) for name, field in Recipe.model_fields.items()}
    last_named = sorted(sections.items(), key=lambda item: item[0] != "export")  # model.dtype before export.dtype
    homes = {k: name for name, section in last_named if section for k in section.model_fields}
    if key in homes:
        return f"It belongs under {homes[key]}."
    here = suggest(key, known)
    elsewhere = get_close_matches(key, homes, n=1, cutoff=0.5)
    if here.startswith("Known") and elsewhere:
        return f"Did you mean '{homes[elsewhere[0]]}.{elsewhere[0]}'?"
    return here


def _dotted(loc: tuple[str | int, ...]) -> str:
    return ".".join(str(key) for key in loc if key != "[key]")


def _place(loc: tuple[str | int, ...], where: Where) -> str:
    """The place of the nearest key that the file or an override names."""
    keys = tuple(map(str, loc))
    return next(where[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in where)


def _explained(error: Any, where: Where) -> RecipeError:
    """Turn one error of pydantic into: place, key, what was given, what is expected."""
    loc, kind = tuple(k for k in error["loc"] if k not in (ONE, SEVERAL)), error["type"]
    place, key = _place(loc, where), _dotted(loc) or "the recipe"
    if kind in KEY_KINDS and loc[-1] in FOREIGN:
        why, cure = FOREIGN[str(loc[-1])]
        return RecipeError(f"{place}: {key} is not a key here: {why}.", cure)
    if kind in KEY_KINDS:
        return RecipeError(f"{place}: {key} is not a known key.", _near(str(loc[-1]), _keys_at(loc[:-1])))
    if kind == "missing":
        return RecipeError(f"{place}: {key} is missing.", f"Add {key}; it has no default.")
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, DataError):
        return RecipeError(f"{place}: {key}: {cause.what}", cause.cure)
    whole = len(loc) < 2 or (loc[0] == "data" and loc[1] in ROLES)
    disagree = isinstance(error["input"], dict | list) and kind == "value_error" and whole
    given = " does not agree with itself" if disagree else f" is {_shown(error['input'])}"
    quotes = " Put quotes around text." if kind == "string_type" and error["input"] is not None else ""
    return RecipeError(f"{place}: {key}{given}, expected {_expected(error)}.", f"Change {key}.{quotes}")


def _shown(value: Any) -> str:
    kinds = {bool: "true or false", str: "text", int: "a number", float: "a number", dict: "a mapping"}
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return "null" if value is None else f"{text} ({kinds.get(type(value), type(value).__name__)})"


EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a section with keys",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
    "string_pattern_mismatch": "letters, digits, spaces and . _ - only",
}


def _expected(error: Any) -> str:
    """What would have been right, in plain words."""
    context = error.get("ctx", {})
    if isinstance(context.get("error"), Exception):
        return str(context["error"]).replace("\n", " ").rstrip(".")
    if "expected" in context:
        choices = str(context["expected"])
        return f"one of {choices}" if " or " in choices else choices
    limits = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    for name, words in limits.items():
        if name in context:
            return f"a number {words} {context[name]}"
    return EXPECTED.get(error["type"]) or str(error["msg"])


def _resolved(recipe: Recipe, base_dir: Path) -> Recipe:
    """Make local data paths absolute, so that the saved recipe works from anywhere, and fill the name."""
    sources = {role: _found(getattr(recipe.data, role), base_dir) for role in ROLES}
    name = recipe.data.name or _several_names(recipe.data.sets("train"))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={**sources, "name": name})})


def _found(value: Source | list[Source] | None, base_dir: Path) -> Source | list[Source] | None:
    """The sets with absolute paths where they are local; several keep the names that they have in the recipe."""
    if isinstance(value, list):
        named = [one.model_copy(update={"alias": one.title}) for one in value]
        return [found for one in named if isinstance(found := _found(one, base_dir), Source)]
    path = locate(value.path, base_dir) if value else None
    return value.model_copy(update={"path": str(path)}) if value and path else value


def _several_names(sets: tuple[Source, ...]) -> str:
    first = default_name(sets[0].path)
    return first if len(sets) == 1 else "-".join(one.title for one in sets)[:60]
