"""The recipe: one YAML file that says what to tune, on what, how, and what must be kept.

Every key is listed by recipe_schema(). Unknown keys, repeated keys and wrong types are refused, with the
line. Names follow Transformers and TRL.
"""

from holdfast.recipe.names import (
    AUTO,
    COMMAND,
    FILE_KINDS,
    KEEP_FRAC,
    KEEP_IN_CONTEXT,
    METRIC_NAMES,
    OWN_METRIC,
    RECIPE_DIR,
    SCHEMA_FILE,
    SHIPPED,
    TEXT_KINDS,
    default_name,
    locate,
    template_columns,
)
from holdfast.recipe.reading import _resolved, load_recipe, recipe_from
from holdfast.recipe.schema import json_schema, recipe_schema
from holdfast.recipe.sections import ROLES, Data, Export, Measure, Model, Recipe, Section, Source, Training

__all__ = (
    "AUTO",
    "COMMAND",
    "FILE_KINDS",
    "KEEP_FRAC",
    "KEEP_IN_CONTEXT",
    "METRIC_NAMES",
    "OWN_METRIC",
    "RECIPE_DIR",
    "ROLES",
    "SCHEMA_FILE",
    "SHIPPED",
    "TEXT_KINDS",
    "Data",
    "Export",
    "Measure",
    "Model",
    "Recipe",
    "Section",
    "Source",
    "Training",
    "_resolved",
    "default_name",
    "json_schema",
    "load_recipe",
    "locate",
    "recipe_from",
    "recipe_schema",
    "template_columns",
)
