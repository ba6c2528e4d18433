"""Every key of a recipe with its default: as a list for people, as a JSON schema for editors."""

import json
from typing import Any, Literal, get_args, get_origin

import yaml

from holdfast.recipe.dialect import Dumper
from holdfast.recipe.sections import ROLES, Recipe, Section, Source


def recipe_schema() -> str:
    """Return every key with its default and description, one a line, for `holdfast recipe`."""
    lines = []
    for section, field in Recipe.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            lines.append(_key_line(section, field))
        else:
            for key, sub in inner.model_fields.items():
                lines.append(_key_line(f"{section}.{key}", sub))
                if key == ROLES[0]:  # the other roles have the same keys
                    lines += [_key_line(f"{section}.{key}.{k}", s) for k, s in Source.model_fields.items()]
    return "\n".join(lines)


def json_schema() -> str:
    """The JSON schema of a recipe for editors, as it ships (SCHEMA_FILE): keys, types, defaults and descriptions.

    Beside the model's own it allows the short forms: a path for a data set, one tracker, a section without keys. What
    depends on two keys is left to `load_recipe`.
    """
    schema = Recipe.model_json_schema()
    parts = schema["$defs"]
    parts["Source"] = {"anyOf": [{"type": "string", "minLength": 1}, parts["Source"]]}
    for role in ROLES:
        _any_of(parts["Data"]["properties"][role])
    trackers = parts["Training"]["properties"]["report_to"]
    names = {"enum": ["none", *trackers["items"]["enum"]]}
    kept = {k: trackers.pop(k) for k in ("type", "items")}
    trackers["anyOf"] = [kept, names]
    for name, part in schema["properties"].items():
        ref = part.pop("$ref", None)
        if ref and name not in schema["required"]:
            part["anyOf"] = [{"$ref": ref}, {"type": "null"}]
        elif ref:
            part["$ref"] = ref
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of Holdfast"}
    return json.dumps({**schema, **head}, indent=1, ensure_ascii=True) + "\n"


def _any_of(part: Any) -> None:
    """`oneOf` as `anyOf`, which editors take as well, wherever it stands."""
    if isinstance(part, dict) and "oneOf" in part:
        part["anyOf"] = part.pop("oneOf")
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _any_of(inner)


def _key_line(key: str, field: Any) -> str:
    default = "required" if field.is_required() else yaml.dump(field.default, Dumper=Dumper, default_flow_style=True)
    default = default.removesuffix("\n").removesuffix("\n...")
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    listed = f" One of: {', '.join(map(str, choices))}." if len(choices) > 1 else ""
    return f"{key:<40} {default:<20} {field.description}{listed}"


def section_of(annotation: Any) -> type[Section] | None:
    """The section behind an annotation such as `Source | None` or `list[Source]`, if it is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)
