"""recipe: every key of a recipe with its default."""

from __future__ import annotations


def command() -> None:
    """`holdfast recipe`."""
    from holdfast.recipe import recipe_schema

    print(recipe_schema())
