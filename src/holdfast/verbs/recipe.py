"""recipe: every key of a recipe with its default, or the JSON schema of recipes."""

from __future__ import annotations


def command(schema: bool) -> None:
    """`holdfast recipe`."""
    from holdfast.recipe import json_schema, recipe_schema

    print(json_schema() if schema else recipe_schema(), end="" if schema else "\n")
