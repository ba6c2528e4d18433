"""The sections of a recipe: every key with its type, default and description, and what does not go together."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag
from pydantic import field_validator as check
from pydantic import model_validator as check_all

from holdfast.engine import BATCH_TOKENS
from holdfast.recipe.dialect import Dumper
from holdfast.recipe.names import (
    AUTO,
    COMMAND,
    GROUPS,
    KEEP_FRAC,
    KEEP_IN_CONTEXT,
    METRIC_NAMES,
    OLD_WARMUP,
    OWN_METRIC,
    default_name,
    template_columns,
)


class Section(BaseModel):
    """Strict, frozen base of every section."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _whole_from_one(value: float | None) -> float | None:
    if value is not None and value >= 1 and value != int(value):
        raise ValueError("a fraction below 1, or a whole count")
    return value


class Model(Section):
    """The base model."""

    model_name_or_path: str = Field(min_length=1, description="Hub id, folder, PEFT adapter, or GGUF file.")
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
    prompt: str | None = Field(default=None, description="Template of this set, '': plain text; null: data.prompt.")
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
        return self.alias or "-".join(filter(None, [default_name(self.path), self.name]))


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
        default=None, description="Template over columns, e.g. '{text}\\nQueue:', '': plain text; null: detect."
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
        description=f"{', '.join(METRIC_NAMES)}, module:function or command: PROGRAM; "
        "null: accuracy for a closed set, else loss (by byte for plain text).",
    )

    _size = check("validation_size")(_whole_from_one)

    @check("metric")
    @classmethod
    def _known_metric(cls, value: str | None) -> str | None:
        known = value is None or value in METRIC_NAMES or value.startswith(COMMAND)
        if not known and not re.fullmatch(OWN_METRIC, str(value)):
            raise ValueError(f"one of {', '.join(METRIC_NAMES)}, module:function or command: PROGRAM")
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
        if self.stride and self.too_long not in (None, "split"):
            raise ValueError(f"no stride beside too_long {self.too_long}, for only parts of a split row share tokens")
        if self.validation and self.validation_size:
            raise ValueError("no validation_size beside validation, for then nothing is cut from train")
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
    torch_compile: bool = Field(
        default=False, description="Compile the blocks: a first step of minutes, then shorter ones."
    )
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
    save_total_limit: int | None = Field(default=1, ge=1, description="Checkpoints kept; only 1 is taken.")
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
        description="Suites; auto: in-context, for chat instructions, and the default ones if cheap.",
    )
    num_fewshot: int = Field(default=8, ge=0, description="Demonstrations in a few-shot prompt.")
    limit: int | None = Field(default=None, ge=1, description="Items of each task; null: each suite's own number.")
    batch_tokens: int = Field(default=BATCH_TOKENS, ge=1, description="Tokens scored in one forward pass.")
    invariant: bool = Field(
        default=False, description="Scores with the same bits whatever batch_tokens is; each request alone, so slower."
    )
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Longest answer to the task; null: 1.5 of the longest reference, 16 to 512."
    )
    keep: dict[str, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        default=None,
        description=f"Shares of the base score to keep; null: {KEEP_IN_CONTEXT} of in-context. Others: {KEEP_FRAC}.",
    )
    budget: bool | None = Field(
        default=None,
        description="Take back as much of the change as keep asks for, reported on other items; null: where one can.",
    )
    skip_before: bool = Field(default=False, description="Do not measure the base model first.")

    @property
    def floors(self) -> Mapping[str, float]:
        """Shares to keep: those of `keep`, and that of in-context where it is measured and nobody says another."""
        usual = {"in-context": KEEP_IN_CONTEXT} if {"in-context", *GROUPS} & set(self.suites) else {}
        return {**usual, **(self.keep or {})}

    @property
    def forwards(self) -> dict[str, Any]:
        """How whatever scores or generates is to run the model."""
        return {"batch_tokens": self.batch_tokens, "invariant": self.invariant}

    @property
    def rounds_as(self) -> int | str:
        """What scores are kept by: other forwards round otherwise."""
        return "invariant" if self.invariant else self.batch_tokens

    @check_all(mode="after")
    def _budget_of_something(self) -> "Measure":
        if self.budget and (self.skip_before or not self.floors):
            raise ValueError("keep and no skip_before beside budget: it is a share of what the base can do")
        return self

    @check_all(mode="after")
    def _known_floors(self) -> "Measure":
        for suite in self.keep or ():
            if suite not in self.suites and not GROUPS & set(self.suites):  # else runs.checks
                raise ValueError(f"keep to name measured suites only, and {suite} is not in suites")
        return self


class Export(Section):
    """What is written beside the adapter or the tuned weights."""

    merge: bool = Field(default=False, description="Write the weights with the adapter merged in.")
    folder: str | None = Field(default=None, description="Where to; null: output_dir/model.")
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
        default=None, description="Methods: names or {name: {field: value}}; null: LoRA and ICLAnchor."
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
        text = yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
        Path(path).write_text(text, encoding="utf-8")
