"""The recipe: one YAML file that says what to tune, on what, how, and what must be kept.

Every key is listed by recipe_schema(). Unknown keys, repeated keys and wrong types are refused, with the
line. Names follow Transformers and TRL.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, ValidationError
from pydantic import field_validator as check
from pydantic import model_validator as check_all

from holdfast.engine import BATCH_TOKENS
from holdfast.errors import DataError, RecipeError, suggest
from holdfast.foreign_keys import FOREIGN

KEEP_FRAC = 0.95
AUTO = "auto"  # of the suites: what the training makes cheap
SHIPPED = "holdfast:"  # prefix of the data sets and recipes that come with the package
RECIPE_DIR = Path(__file__).parent / "recipes"  # demo.yaml is holdfast:demo
TEXT_KINDS = (".txt", ".md")  # one document each
FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *TEXT_KINDS)
SCHEMA_FILE = RECIPE_DIR / "recipe.schema.json"  # json_schema(), written by tools/make_docs.py
METRIC_NAMES = ("accuracy", "exact_match", "loss", "loss_per_byte", "chrf", "rouge_l", "number")
OWN_METRIC = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # module:function
OLD_WARMUP = "warmup_ratio"
KEY_KINDS = ("extra_forbidden", "invalid_key")  # pydantic's names for "no such key"


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, in order. Only plain {column} fields are allowed.

    Raises:
        DataError: broken braces, or a field with an attribute, index, conversion or format.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"The template {template!r} is broken: {error}.", "Write {{ for a brace.") from None
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in fields:
        if not name or spec or conversion or re.search(r"[.\[\]{}]", name):
            what = f"The template {template!r} has a field that is more than a column name: {name!r}."
            raise DataError(what, "Only plain {column} fields are allowed; write {{ for a brace.")
    return tuple(dict.fromkeys(name for name, _, _ in fields))


def locate(path: str, base_dir: str | Path) -> Path | None:
    """Find a local file or folder, first beside the recipe (base_dir), then in the working directory."""
    if path.startswith(SHIPPED):
        return None
    for root in (Path(base_dir), Path.cwd()):
        found = root / os.path.expanduser(path)
        if found.exists():
            return Path(os.path.abspath(found))  # not resolve(): a linked file must keep its suffix
    return None


class Section(BaseModel):
    """Strict, frozen base of every section."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _whole_from_one(value: float | None) -> float | None:
    if value is not None and value >= 1 and value != int(value):
        raise ValueError("a fraction below 1, or a whole count")
    return value


class Model(Section):
    """The base model."""

    model_name_or_path: str = Field(min_length=1, description="Hub id, folder, or GGUF file of the base model.")
    model_revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="Weights' type.")
    load_in_4bit: bool = Field(default=False, description="Keep the base in 4 bits (CUDA, bitsandbytes, LoRA plans).")
    attn_implementation: str | None = Field(default=None, description="eager, sdpa, flash_attention_2; null: library.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")


class Source(Section):
    """Where one data set comes from. A plain string in the recipe means {path: string}."""

    path: str = Field(min_length=1, description="File, folder, hub id, or holdfast:<shipped file>.")
    name: str | None = Field(default=None, description="Configuration name of a hub data set.")
    split: str | None = Field(default=None, description="Split of a hub data set or folder.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub data set.")
    streaming: bool = Field(default=False, description="Read only as many rows as the run needs, as they come.")
    alias: str | None = Field(
        default=None, pattern=r"^[\w.-]+$", description="Name of one set of several; default from the path."
    )
    prompt: str | None = Field(default=None, description="Template of this set; null: data.prompt.")
    completion: str | None = Field(default=None, description="Template of this set; null: data.completion.")
    weight: float | None = Field(default=None, gt=0, description="Of several sets: share of the rows of an epoch.")

    @check_all(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": str(value)} if isinstance(value, str | Path) else value

    @check("prompt", "completion")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        return _checked_template(value)

    @check_all(mode="after")
    def _consistent(self) -> "Source":
        _check_pair(self.prompt, self.completion)
        return self

    @property
    def title(self) -> str:
        """What the set is called among several."""
        return self.alias or "-".join(filter(None, [_default_name(self.path), self.name]))


def _checked_template(value: str | None) -> str | None:
    if value is not None:
        template_columns(value)
    return value


def _check_pair(prompt: str | None, completion: str | None) -> None:
    if (prompt is None) != (completion is None):
        raise ValueError("prompt and completion together, or neither")
    if completion is not None and not template_columns(completion):
        raise ValueError("a completion with a {column}; this one would be the same for every row")


ONE, SEVERAL = "[one]", "[several]"  # pydantic puts them into the place of an error
Sets = Annotated[
    Annotated[Source, Tag(ONE)] | Annotated[list[Source], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, list) else ONE),
]
ROLES = ("train", "validation", "test")


class Data(Section):
    """The task."""

    name: str = Field(default="", pattern=r"^[\w .-]*$", description="Name shown in reports; default from the file.")
    train: Sets = Field(
        description="File (beside the recipe, then here), hub id, holdfast:<shipped>, or a list of several sets."
    )
    validation: Sets | None = Field(default=None, description="null: validation_size rows are cut from train.")
    test: Sets | None = Field(default=None, description="null: the report uses validation, and says so.")
    validation_size: float | None = Field(
        default=None,
        ge=0,
        description="Rows cut from train: fraction (<1) or count; null: a tenth, at most test_size.",
    )
    train_size: int | None = Field(default=None, ge=1, description="Use only so many training rows (seeded).")
    test_size: int | None = Field(
        default=500, ge=1, description="Measure on only so many test or validation rows (seeded); null: on all."
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="Seed of the rows that are cut and drawn; null: that of their order."
    )
    prompt: str | None = Field(
        default=None, description="Template over columns, e.g. '{text}\\nQueue:'; null: detect."
    )
    completion: str | None = Field(default=None, description="Template over columns, e.g. ' {queue}'; null: detect.")
    max_length: int = Field(default=1024, ge=2, description="Longest row in tokens.")
    too_long: Literal["refuse", "drop", "truncate", "split"] | None = Field(
        default=None,
        description="Longer rows: refuse, drop, truncate or split; null: drop, and split for plain text.",
    )
    stride: int | None = Field(
        default=None, ge=1, description="Tokens that neighbours of a split row share, as context; null: an eighth."
    )
    train_on: Literal["last", "assistant", "all"] = Field(
        default="assistant", description="Of a conversation: its last answer, all its answers, or every token."
    )
    metric: str | None = Field(
        default=None,
        description=f"{', '.join(METRIC_NAMES)} or module:function; "
        "null: accuracy for a closed set, else loss (by byte for plain text).",
    )

    _size = check("validation_size")(_whole_from_one)

    @check("metric")
    @classmethod
    def _known_metric(cls, value: str | None) -> str | None:
        if value is not None and value not in METRIC_NAMES and not re.fullmatch(OWN_METRIC, value):
            raise ValueError(f"one of {', '.join(METRIC_NAMES)}, or module:function")
        return value

    @check("prompt", "completion")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        return _checked_template(value)

    @check(*ROLES)
    @classmethod
    def _told_apart(cls, value: Source | list[Source] | None, info: Any) -> Source | list[Source] | None:
        sets = value if isinstance(value, list) else [value] if value else []
        names = [one.title for one in sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sets with different names, and two are called {twice[0]!r}: give each its alias")
        weighed = [one.title for one in sets if one.weight is not None]
        streamed = [one.title for one in sets if one.streaming]
        if streamed and info.field_name != "train":
            raise ValueError(f"no streaming, for only sets to train on are streamed ({streamed[0]!r} is)")
        if streamed and len(sets) > 1 and not weighed:
            raise ValueError(f"weights beside streaming, which say how many rows of {streamed[0]!r} are read")
        if weighed and info.field_name != "train":
            raise ValueError(f"no weight, which only sets to train on have (on {weighed[0]!r})")
        if weighed and not isinstance(value, list):
            raise ValueError("no weight, for it is one set and no list of several")
        if weighed and len(weighed) < len(sets):
            bare = next(name for name in names if name not in weighed)
            raise ValueError(f"a weight on every set or on none, and {bare!r} has none")
        return value

    @check_all(mode="after")
    def _consistent(self) -> "Data":
        _check_pair(self.prompt, self.completion)
        if self.stride and self.stride >= self.max_length:
            raise ValueError(f"a stride ({self.stride}) below max_length ({self.max_length})")
        if not (self.validation or self.test) and self.validation_size == 0:
            raise ValueError("a validation or test set, or validation_size above 0, to report on")
        return self

    def sets(self, role: str) -> tuple[Source, ...]:
        """The sets of "train", "validation" or "test"; none for a role that is not given."""
        value: Source | list[Source] | None = getattr(self, role)
        return tuple(value) if isinstance(value, list) else (value,) if value else ()


class Training(Section):
    """The training run; names of transformers.TrainingArguments."""

    output_dir: str = Field(default="runs/tuned", min_length=1, description="Run folder.")
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto", "search"] = Field(
        default="auto",
        description="Peak learning rate; auto: from what trains and the width of the model; search: short trials.",
    )
    per_device_train_batch_size: int = Field(default=16, ge=1, description="Rows in one forward pass.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Forward passes in one step.")
    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(default=-1, ge=-1, description="Stop after so many steps; -1: num_train_epochs decides.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = Field(default="linear", description="Course of the learning rate.")
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default={}, description="Settings of that course, as transformers' get_scheduler takes them."
    )
    warmup_steps: float = Field(default=0.05, ge=0, description="Warm-up: steps, or below 1 a share of all steps.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradient clipping; 0: none.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW beta 2.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"] = Field(
        default="adamw_torch_fused", description="Optimiser; the last two are bitsandbytes'."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of everything that is drawn.")
    data_seed: int | None = Field(default=None, ge=0, lt=2**32, description="Seed of the row order; null: seed.")
    bf16: bool | None = Field(default=None, description="Mixed precision; null: where the device does it well.")
    gradient_checkpointing: bool = Field(default=False, description="Less memory for more time.")
    packing: bool | None = Field(default=None, description="Lay rows end to end, exact; false: pad them instead.")
    logging_steps: int = Field(default=5, ge=1, description="Steps between two lines of the log.")
    save_steps: int = Field(default=50, ge=1, description="Steps between two checkpoints.")
    save_strategy: Literal["steps", "epoch"] = Field(
        default="steps", description="Save every save_steps, or after each pass over the training rows."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between looks at 100 validation rows and 8 items a task; null: none.",
    )
    load_best_model_at_end: bool = Field(
        default=False, description="End with the best look by the task above measure.keep; the base is one of them."
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="End after so many looks in a row that are no better; null: never."
    )
    save_total_limit: int | None = Field(default=1, ge=1, description="Checkpoints kept; null: all.")
    run_name: str | None = Field(
        default=None, min_length=1, description="Name of the run in trackers; null: that of its folder."
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(
        default=[],
        description="Of tensorboard, trackio, wandb, mlflow; offline unless told else.",
    )

    @check("learning_rate", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if not number and value not in ("auto", "search"):
            raise ValueError("a number above 0, auto or search")
        return value

    @check_all(mode="before")
    @classmethod
    def _old_name(cls, value: Any) -> Any:
        """`warmup_ratio` is what transformers called a `warmup_steps` below 1."""
        if not isinstance(value, Mapping) or OLD_WARMUP not in value:
            return value
        share = value[OLD_WARMUP]
        if "warmup_steps" in value or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"warmup_steps alone; {OLD_WARMUP} is its old name, for a share from 0 to below 1")
        return {**{k: v for k, v in value.items() if k != OLD_WARMUP}, "warmup_steps": float(share)}

    @check("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return ([] if value == "none" else [value]) if isinstance(value, str) else value

    _warmup = check("warmup_steps")(_whole_from_one)

    @check_all(mode="after")
    def _looks(self) -> "Training":
        if self.eval_steps is None and (self.load_best_model_at_end or self.early_stopping_patience):
            raise ValueError("eval_steps beside load_best_model_at_end and early_stopping_patience")
        return self

    @check("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("-1 (num_train_epochs decides) or a count above 0")
        return value


class Measure(Section):
    """What is measured before and after, and how much of it must be kept."""

    suites: list[str] = Field(
        default=[AUTO],
        description="Abilities to measure; auto: in-context, and all default suites if they cost under a tenth of it.",
    )
    num_fewshot: int = Field(default=8, ge=0, description="Demonstrations in a few-shot prompt.")
    limit: int | None = Field(default=None, ge=1, description="Items of each task; null: 48.")
    batch_tokens: int = Field(default=BATCH_TOKENS, ge=1, description="Tokens scored in one forward pass.")
    invariant: bool = Field(
        default=False, description="Scores with the same bits whatever batch_tokens is; each request alone, so slower."
    )
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Longest answer to the task; null: 1.5 of the longest reference, 16 to 512."
    )
    keep: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default={"in-context": KEEP_FRAC},
        description=f"Share of the base score to keep; default {KEEP_FRAC} each.",
    )
    budget: bool = Field(
        default=False, description="Take back as much of the change as keep asks for; reported on other items."
    )
    skip_before: bool = Field(default=False, description="Do not measure the base model first.")

    @property
    def forwards(self) -> dict[str, Any]:
        """How whatever scores or generates is to run the model."""
        return {"batch_tokens": self.batch_tokens, "invariant": self.invariant}

    @property
    def rounds_as(self) -> int | str:
        """What scores are kept by: other forwards round otherwise."""
        return "invariant" if self.invariant else self.batch_tokens

    @check_all(mode="before")
    @classmethod
    def _keep_all(cls, value: Any) -> Any:
        """A recipe that names suites and no floors must prove in-context; the others prove what their items can."""
        suites = value.get("suites") if isinstance(value, Mapping) else None
        if isinstance(suites, list) and "keep" not in value:
            return {**value, "keep": {"in-context": KEEP_FRAC} if {"in-context", AUTO} & set(suites) else {}}
        return value

    @check_all(mode="after")
    def _budget_of_something(self) -> "Measure":
        if self.budget and (self.skip_before or not self.keep):
            raise ValueError("keep and no skip_before beside budget: it is a share of what the base can do")
        return self

    @check_all(mode="after")
    def _known_floors(self) -> "Measure":
        for suite in self.keep:
            if suite not in self.suites and not {"default", "all", AUTO} & set(self.suites):  # else runs.checks
                raise ValueError(f"keep to name measured suites only, and {suite} is not in suites")
        return self


class Export(Section):
    """What is written beside the adapter or the tuned weights."""

    merge: bool = Field(default=False, description="Write the weights with the adapter merged in.")
    folder: str | None = Field(default=None, description="Where to; null: inside output_dir.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the weights that are written; auto: the base's, of an adapter float32."
    )
    gguf: bool | str = Field(
        default=False, description="Also write model.gguf by llama.cpp; true, or the path of its folder or script."
    )
    push_to_hub: str | None = Field(
        default=None, min_length=1, description="Upload what is written to this repository (user/name) at the end."
    )
    hub_private_repo: bool = Field(default=True, description="The repository is private.")


def _plan_item(item: Any) -> str | dict[str, dict[str, Any]]:
    """Check the shape only; the plan itself knows the methods and their fields."""
    if isinstance(item, str) and item:
        return item
    if isinstance(item, dict) and len(item) == 1:
        (name, fields), *_ = item.items()
        if isinstance(name, str) and (fields is None or isinstance(fields, dict)):
            return {name: fields or {}}
    raise ValueError("a method name, or one {name: {field: value}}")


PlanItem = Annotated[
    str | dict[str, dict[str, Any]],
    PlainValidator(_plan_item, json_schema_input_type=str | dict[str, dict[str, Any] | None]),
]


class Recipe(Section):
    """A whole recipe. Read one with load_recipe; build one in Python with recipe_from."""

    model: Model = Field(description="The base model.")
    data: Data = Field(description="The task.")
    training: Training = Field(default=Training(), description="The training run.")
    plan: list[PlanItem] | None = Field(
        default=None, description="Methods: names or {name: {field: value}}; null: default."
    )
    measure: Measure = Field(default=Measure(), description="What is measured and kept.")
    export: Export = Field(default=Export(), description="What is written at the end.")

    @check_all(mode="after")
    def _ends(self) -> "Recipe":
        streams = any(one.streaming for one in self.data.sets("train"))
        if streams and self.data.train_size is None and self.training.max_steps < 1:
            raise ValueError("training.max_steps or data.train_size beside streaming: how many rows to read")
        return self

    @check_all(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        """`training:` with every line below it commented out means the defaults."""
        if not isinstance(value, Mapping):
            return value
        return {k: {} if v is None and k in cls.model_fields and k != "plan" else v for k, v in value.items()}

    @property
    def seed_of_rows(self) -> int:
        """Of what is cut and drawn from the files, however the rows are ordered afterwards."""
        first = (self.data.seed, self.training.data_seed, self.training.seed)
        return next(seed for seed in first if seed is not None)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML; load_recipe of it gives an equal recipe."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
        Path(path).write_text(text, encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Safe loader that also reads 3e-4 as a number, as YAML 1.2 does."""


class _Dumper(yaml.SafeDumper):
    """The same rule when writing, so that the text '3e-4' is quoted; never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_EXPONENT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))

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


def recipe_schema() -> str:
    """Return every key with its default and description, one a line, for `holdfast recipe`."""
    lines = []
    for section, field in Recipe.model_fields.items():
        inner = _model_of(field.annotation)
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
    default = "required" if field.is_required() else yaml.dump(field.default, Dumper=_Dumper, default_flow_style=True)
    default = default.removesuffix("\n").removesuffix("\n...")
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    listed = f" One of: {', '.join(map(str, choices))}." if len(choices) > 1 else ""
    return f"{key:<40} {default:<20} {field.description}{listed}"


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
        loader = _Loader(text)
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
    for event in yaml.parse(text, Loader=_Loader):
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
        parsed = yaml.load(value, Loader=_Loader)  # a subclass of SafeLoader
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


def _model_of(annotation: Any) -> type[Section] | None:
    """The section behind an annotation such as `Source | None` or `list[Source]`, if it is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_model_of, get_args(annotation))), None)


def _keys_at(loc: tuple[str | int, ...]) -> list[str]:
    """The known keys of the section at loc."""
    section: type[Section] = Recipe
    for key in (k for k in loc if isinstance(k, str)):
        section = _model_of(section.model_fields[key].annotation) or section
    return list(section.model_fields)


def _near(key: str, known: list[str]) -> str:
    """The known key that was meant: here under another name, or the same or a like name in a section."""
    sections = {name: _model_of(field.annotation) for name, field in Recipe.model_fields.items()}
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
    first = _default_name(sets[0].path)
    return first if len(sets) == 1 else "-".join(one.title for one in sets)[:60]


def _default_name(path: str) -> str:
    """tickets for holdfast:tickets/train.jsonl and data/tickets.csv, sst2 for stanfordnlp/sst2."""
    plain = Path(path.removeprefix(SHIPPED))
    stem = plain.stem if plain.suffix in FILE_KINDS else plain.name
    generic = stem in ("train", "training", "data", "validation", "test") and plain.parent.name not in ("", "..")
    return re.sub(r"[^\w.-]+", "-", plain.parent.name if generic else stem).strip("-.") or "task"
